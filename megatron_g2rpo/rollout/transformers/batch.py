# SPDX-License-Identifier: Apache-2.0
"""Continuous batching: responses are decoded together; finished ones leave the batch, and waiting ones enter it.

A prompt is prefilled when the first of its responses enters, and its keys and values stay until the last one has left.
Moving keys and values costs about as much as a decoding step, so responses leave and enter together: when a share of
the batch is finished, or the cache is full.

Shape letters: ``B`` responses that are now decoded, ``T`` new tokens, ``H`` hidden size.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_g2rpo.rollout.transformers.features import Features
from megatron_g2rpo.rollout.transformers.prefill import Prefill, PromptTokens
from megatron_g2rpo.rollout.transformers.prefix_cache import Prefilled, PrefixCache, Rows
from megatron_g2rpo.rollout.transformers.sampling import Draw

# The cache grows by this many tokens a response, and responses leave and enter once they are this share of the batch.
FREE_TOKENS = 64
SHARE = 0.15


class Wanted(NamedTuple):
    """A response to generate.

    Attributes:
        prompt: number of its prompt among the distinct ones of the call.
        name: what the caller tells it apart by.
        uniform: float64 ``[T]``, its random numbers; None: it is greedy.
    """

    prompt: int
    name: int
    uniform: Tensor | None


class Finished(NamedTuple):
    """A finished response, on the CPU.

    Attributes:
        name: the name that it was wanted under.
        tokens: int64 ``[length]``.
        logprobs: float32 ``[length]``.
        kept: the tokens that each was drawn from, int64, -1 where there are fewer; empty where nobody asked.
    """

    name: int
    tokens: Tensor
    logprobs: Tensor
    kept: list[Tensor]


@dataclass
class _Row:
    """A response that is being decoded: ``began`` at that step; its prompt has that ``place`` in the cache."""

    wanted: Wanted
    began: int
    place: int
    kept: list[Tensor] = field(default_factory=list)


class _State(NamedTuple):
    """What is known of the responses on the device, one row each.

    Attributes:
        hidden: ``[B, H]``, what the output head reads next.
        positions: int64 ``[B]``, the position of the next token.
        ages: int64 ``[B]``, number of tokens that were drawn.
        lengths: int64 ``[B]``, number of tokens at the end; the limit for those that go on.
        running: bool ``[B]``, False for those that have ended.
        uniform: float64 ``[B, T + 1]``; the last column is for those that have ended, and go on until they leave.
        tokens: int64 ``[B, T + 1]``.
        logprobs: float32 ``[B, T + 1]``.
    """

    hidden: Tensor
    positions: Tensor
    ages: Tensor
    lengths: Tensor
    running: Tensor
    uniform: Tensor
    tokens: Tensor
    logprobs: Tensor


class Batch:
    """The responses that are being decoded, and those that wait.

    Args:
        prompts: the distinct prompts of the call.
        wanted: the responses in the order in which they enter.
        prefill: computes prompts.
        features: gives the features of their images.
        batch_size: largest number of responses that are decoded together.
        limit: number of tokens after which a response ends.
        device: the model's device.

    Attributes:
        cache: keys and values.
        num_running: number of responses that go on.
        prefilled_tokens: number of prompt tokens that were computed so far.
    """

    def __init__(
        self,
        prompts: Sequence[PromptTokens],
        wanted: Iterable[Wanted],
        prefill: Prefill,
        features: Features,
        *,
        batch_size: int,
        limit: int,
        device: torch.device,
    ) -> None:
        self._prompts, self._prefill, self._features = prompts, prefill, features
        self._waiting = deque(wanted)
        self._to_enter = Counter(each.prompt for each in self._waiting)
        self._batch_size, self._limit, self._device = batch_size, limit, device
        self._rows: list[_Row] = []
        self._places: list[int] = []  # the prompts in the cache, by place
        self._after: tuple[Tensor, Tensor] | None = None  # hidden state and next position after each of them
        self._state: _State | None = None
        self._step = 0
        self.cache = PrefixCache(device)
        self.num_running = 0
        self.prefilled_tokens = 0

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def state(self) -> _State:
        """The responses' state; there are some."""
        assert self._state is not None
        return self._state

    @property
    def wanted(self) -> list[Wanted]:
        """The responses, in the order of their rows."""
        return [row.wanted for row in self._rows]

    def indices(self, *, greedy: bool) -> Tensor | None:
        """Return the rows of the responses that are greedy, or of those that are not; None where that is all rows."""
        rows = [index for index, row in enumerate(self._rows) if (row.wanted.uniform is None) == greedy]
        return None if len(rows) == len(self._rows) else torch.tensor(rows, dtype=torch.int64, device=self._device)

    @property
    def is_exchange_due(self) -> bool:
        """Whether ``exchange`` is to be called before the next tokens are drawn."""
        if self.num_running <= (1 - SHARE) * len(self._rows):
            return True
        return self.cache.free_columns == 0 and self._tokens_left(self._rows) > 1

    def _tokens_left(self, rows: Sequence[_Row]) -> int:
        return max(self._limit - (self._step - row.began) for row in rows)

    # -- a step ------------------------------------------------------------------------------------------------------

    def numbers(self) -> Tensor:
        """Return float64 ``[B]``, the random number of each response's next token."""
        state = self.state
        return state.uniform.gather(1, state.ages.clamp(max=self._limit)[:, None])[:, 0]

    def record(self, drawn: Draw, ended: Tensor) -> None:
        """Take the next token of each response.

        Args:
            drawn: the tokens ``[B]``.
            ended: bool ``[B]``, whether each ends its response; at the token limit all do.
        """
        state = self.state
        column = state.ages.clamp(max=self._limit)[:, None]
        state.tokens.scatter_(1, column, drawn.tokens[:, None])
        state.logprobs.scatter_(1, column, drawn.logprobs.float()[:, None])
        if drawn.kept is not None:
            for row, kept in zip(self._rows, drawn.kept.cpu().unbind(), strict=True):
                row.kept.append(kept)
        state.ages.add_(1)
        ended = (ended | (state.ages == self._limit)) & state.running
        state.lengths.copy_(torch.where(ended, state.ages, state.lengths))
        state.running.logical_and_(~ended)
        self._step += 1
        self.num_running = int(state.running.sum())  # a wait for a GPU

    def follow(self, hidden: Tensor) -> None:
        """Take the hidden states ``[B, H]`` at the tokens that were recorded last."""
        self._state = self.state._replace(hidden=hidden, positions=self.state.positions + 1)

    # -- between steps -----------------------------------------------------------------------------------------------

    def exchange(self) -> list[Finished]:
        """Let the finished responses leave, and as many enter as there is room for; return the finished ones."""
        running = [] if self._state is None else self._state.running.tolist()
        finished = self._finished(running)
        stay = [index for index, goes_on in enumerate(running) if goes_on]
        entering = self._next_in_line(len(stay))
        if not stay and not entering:
            self._rows = []
            return finished
        kept, new = self._prompts_for(stay, entering)
        place = {prompt: number for number, prompt in enumerate(self._places)}
        entered = [_Row(each, self._step, place[each.prompt]) for each in entering]
        old = [self._rows[index] for index in stay]
        for row in old:
            row.place = place[row.wanted.prompt]
        rows = old + entered
        order = sorted(range(len(rows)), key=lambda index: rows[index].place)
        source = [stay[index] if index < len(stay) else -1 for index in order]
        self._state = self._next_state(entered, [*stay, *range(len(running), len(running) + len(entered))], order)
        self._rows = [rows[index] for index in order]
        self.cache.rearrange(
            kept,
            new,
            Rows(source=source, prompt=[row.place for row in self._rows]),
            min(FREE_TOKENS, self._tokens_left(self._rows)),
        )
        self.num_running = len(self._rows)
        return finished

    def _finished(self, running: Sequence[bool]) -> list[Finished]:
        ended = [index for index, goes_on in enumerate(running) if not goes_on]
        if not ended:
            return []
        state, rows = self.state, torch.tensor(ended, device=self._device)
        tokens, logprobs, lengths = (each[rows].cpu() for each in (state.tokens, state.logprobs, state.lengths))
        return [
            Finished(
                self._rows[index].wanted.name,
                tokens[number, :length].clone(),
                logprobs[number, :length].clone(),
                self._rows[index].kept[:length],
            )
            for number, (index, length) in enumerate(zip(ended, lengths.tolist(), strict=True))
        ]

    def _next_in_line(self, staying: int) -> list[Wanted]:
        """Take the responses from the queue that enter now; a few alone are not worth the move."""
        room = self._batch_size - staying
        if staying and room < min(len(self._waiting), ceil(SHARE * self._batch_size)):
            return []
        entering = [self._waiting.popleft() for _ in range(min(room, len(self._waiting)))]
        self._to_enter.subtract(each.prompt for each in entering)
        return entering

    def _prompts_for(self, stay: Sequence[int], entering: Sequence[Wanted]) -> tuple[list[int], list[Prefilled]]:
        """Prefill the prompts that are not in the cache; return the places of those that stay there, and the new ones.

        A prompt stays whose responses are there or still to come.
        """
        wanted = {self._rows[index].wanted.prompt for index in stay} | {each.prompt for each in entering}
        kept = [place for place, prompt in enumerate(self._places) if prompt in wanted or self._to_enter[prompt] > 0]
        there = set(self._places)
        fresh = list(dict.fromkeys(each.prompt for each in entering if each.prompt not in there))
        fresh.sort(key=lambda prompt: -len(self._prompts[prompt].token_ids))
        passes = list(self._prefill([self._prompts[prompt] for prompt in fresh], self._features))
        self.prefilled_tokens += sum(len(self._prompts[prompt].token_ids) for prompt in fresh)
        hidden, following = [each.hidden for each in passes], [each.positions for each in passes]
        if kept and self._after is not None:
            index = torch.tensor(kept, device=self._device)
            hidden.insert(0, self._after[0][index])
            following.insert(0, self._after[1][index])
        self._after = torch.cat(hidden), torch.cat(following)
        self._places = [self._places[place] for place in kept] + fresh
        return kept, [each.cache for each in passes]

    def _next_state(self, entered: Sequence[_Row], chosen: Sequence[int], order: Sequence[int]) -> _State:
        """Return the state of the responses from now on.

        Args:
            entered: the new responses.
            chosen: of the rows of before, followed by the new ones, those that go on.
            order: their order from now on.
        """
        fresh = self._fresh(entered)
        both = (
            fresh
            if self._state is None
            else _State(*(torch.cat(pair) for pair in zip(self._state, fresh, strict=True)))
        )
        index = torch.tensor([chosen[place] for place in order], device=self._device)
        return _State(*(each[index] for each in both))

    def _fresh(self, entered: Sequence[_Row]) -> _State:
        assert self._after is not None
        count, columns = len(entered), self._limit + 1
        places = torch.tensor([row.place for row in entered], dtype=torch.int64, device=self._device)
        uniform = torch.zeros(count, columns, dtype=torch.float64)
        for row, numbers in enumerate(each.wanted.uniform for each in entered):
            if numbers is not None:
                uniform[row, : self._limit] = numbers
        return _State(
            hidden=self._after[0][places],
            positions=self._after[1][places],
            ages=torch.zeros_like(places),
            lengths=torch.full_like(places, self._limit),
            running=torch.ones_like(places, dtype=torch.bool),
            uniform=uniform.to(self._device),
            tokens=torch.zeros(count, columns, dtype=torch.int64, device=self._device),
            logprobs=torch.zeros(count, columns, device=self._device),
        )
