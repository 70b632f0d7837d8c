# SPDX-License-Identifier: Apache-2.0
"""Rewards of rollouts: the value of every part that the recipe weighs, and their weighted sum.

``total = sum over parts of weight * part``, added up in the order of ``env.reward_weights``. A rollout of which a part
has no value has no reward, see ``types.Rewards.failures``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_g2rpo import progress
from megatron_g2rpo.recipe import Env
from megatron_g2rpo.tasks import response_formats
from megatron_g2rpo.tasks.part_calls import Ask, Call, Outcome, ask_batch, ask_in_turn, is_batched, raised
from megatron_g2rpo.tasks.reward_parts import PartSettings
from megatron_g2rpo.tasks.workers import PendingBatch, PendingChunk, RewardWorkers
from megatron_g2rpo.types import FailedReward, Response, Rewards, Rollout

OVERLONG, RESPONSE_FORMAT = "overlong", "response_format"
# Failures that an error message shows.
SHOWN_FAILURES = 3


class RewardError(RuntimeError):
    """The run cannot go on with the rewards that there are; the message names samples, tasks and functions.

    A task that ``env.tasks`` lacks, a reference that cannot be read, or too many rollouts without a reward.
    """


@dataclass
class _Entry:
    """A rollout that is scored: what its parts are asked, and what they said."""

    rollout: Rollout
    call: Call | None
    weights: Mapping[str, float]
    values: dict[str, float]
    failure: FailedReward | None = None

    def put(self, name: str, outcome: Outcome) -> None:
        """Keep what a part said; of several failures, the first."""
        if isinstance(outcome, FailedReward):
            self.failure = self.failure or outcome
        else:
            self.values[name] = outcome


class Scoring:
    """Scores rollouts that come in one after the other: workers begin with the first while others are generated.

    Args:
        env: the recipe's ``env`` section.
        response_format: name of the response format for tasks that name none.
        max_response_tokens: largest number of tokens that a response can have.
        overlong_buffer: number of tokens before that limit over which the part ``overlong`` falls; None where the
            recipe has none.
        overlong_weight: weight of the part ``overlong``, which is then added last; None: it is a part only where
            ``env`` weighs it.
        workers: processes that the parts run in; None: this process.
        on_bad_sample: whether a reference that cannot be read is an error, or costs its rollouts their rewards.

    Attributes:
        names: names of the parts, in the order in which they are added up.
    """

    def __init__(
        self,
        env: Env,
        *,
        response_format: str,
        max_response_tokens: int,
        overlong_buffer: int | None = None,
        overlong_weight: float | None = None,
        workers: RewardWorkers | None = None,
        on_bad_sample: Literal["error", "skip"] = "error",
    ) -> None:
        self._env, self._response_format = env, response_format
        self._workers, self._on_bad_sample = workers, on_bad_sample
        added = {} if overlong_weight is None else {OVERLONG: overlong_weight}
        self._settings = {
            name: PartSettings(
                answer_format=task.answer_format,
                length=task.length,
                max_response_tokens=max_response_tokens,
                overlong_buffer=overlong_buffer,
            )
            for name, task in env.tasks.items()
        }
        self._weights = {
            name: {**env.reward_weights, **task.reward_weights, **added} for name, task in env.tasks.items()
        }
        # In this order everywhere, so that the sum rounds alike on every rank.
        named = [env.reward_weights, *(task.reward_weights for task in env.tasks.values()), added]
        self.names = tuple(dict.fromkeys(name for weights in named for name in weights))
        self._batched = tuple(name for name in self.names if is_batched(name))
        # Of each task, the parts that are asked of one response at a time.
        self._single = {
            task: tuple(name for name in self.names if name in weights and name not in self._batched)
            for task, weights in self._weights.items()
        }
        self._entries: dict[int, _Entry] = {}
        self._pending: list[tuple[list[_Entry], list[PendingChunk]]] = []

    def add(self, rollouts: Sequence[Rollout]) -> None:
        """Read the responses of rollouts and let workers, where there are any, begin with them.

        Raises:
            RewardError: a task that ``env.tasks`` lacks.
        """
        entries = [self._entry(rollout) for rollout in rollouts]
        self._entries |= {id(entry.rollout): entry for entry in entries}
        readable = [entry for entry in entries if entry.call is not None]
        if self._workers is not None and readable:
            self._pending.append((readable, self._workers.submit([self._ask(entry) for entry in readable])))

    def rewards(self, rollouts: Sequence[Rollout], *, most_failures: int | None = None) -> Rewards:
        """Return the rewards of rollouts, which wait for the last part; those that were not added are added.

        Args:
            rollouts: N rollouts, in any order.
            most_failures: number of failures above which the others need not be waited for; None: no bound.

        Returns:
            The unweighted value of every part that the recipe weighs, those of weight 0 included, with their weighted
            sum. A part that only some tasks name is computed for their samples, and is 0 with weight 0 for all others.

        Raises:
            RewardError: a task that ``env.tasks`` lacks, more failures than ``most_failures``, or, under
                ``on_bad_sample: error``, a reference that cannot be read.
        """
        self.add([rollout for rollout in rollouts if id(rollout) not in self._entries])
        entries = [self._entries[id(rollout)] for rollout in rollouts]
        self._ask_parts(entries, most_failures)
        bad = next((e.failure for e in entries if e.failure is not None and e.failure.bad_sample), None)
        if bad is not None and self._on_bad_sample == "error":
            raise RewardError(bad.message)
        return self.weighed(
            [entry.rollout.prompt.task for entry in entries],
            [entry.values for entry in entries],
            {index: entry.failure for index, entry in enumerate(entries) if entry.failure is not None},
        )

    def weighed(
        self, tasks: Sequence[str], values: Sequence[Mapping[str, float]], failures: Mapping[int, FailedReward]
    ) -> Rewards:
        """Return the rewards that values of parts add up to.

        Args:
            tasks: the task of each of N rollouts.
            values: the value of each part that the task weighs, for each of them.
            failures: index of a rollout -> why it has no reward.
        """
        rewards = Rewards.none(len(tasks))
        for name in self.names:
            having = [index for index, task in enumerate(tasks) if name in self._weights[task]]
            part, weights = torch.zeros_like(rewards.total), torch.zeros_like(rewards.total)
            part[having] = torch.tensor([values[index].get(name, torch.nan) for index in having], dtype=torch.float64)
            weights[having] = torch.tensor([self._weights[tasks[index]][name] for index in having], dtype=torch.float64)
            rewards = rewards.plus(name, part, weights)
        return _without(rewards, failures)

    def _entry(self, rollout: Rollout) -> _Entry:
        sample = rollout.prompt.sample
        response = read(rollout, self._env, self._response_format)
        weights = self._weights[sample.task]
        if isinstance(response, FailedReward):
            return _Entry(rollout, None, weights, {}, response)
        return _Entry(rollout, Call(sample, response, self._settings[sample.task]), weights, {})

    def _ask(self, entry: _Entry) -> Ask:
        assert entry.call is not None
        return Ask(entry.call, self._single[entry.rollout.prompt.task])

    def _ask_parts(self, entries: Sequence[_Entry], most_failures: int | None) -> None:
        """Ask every part of every response, batched parts at once; keep what they say in the entries."""
        options, workers = self._env.reward_options, self._workers
        batches: list[tuple[str, list[_Entry], PendingBatch | list[Outcome]]] = []
        for name in self._batched:
            having = [entry for entry in entries if name in entry.weights and entry.call is not None]
            calls = [entry.call for entry in having if entry.call is not None]
            if calls:
                answer = ask_batch(name, calls, options) if workers is None else workers.submit_batch(name, calls)
                batches.append((name, having, answer))
        wanted = {id(entry) for entry in entries}
        failures = [entry.failure for entry in entries if entry.failure is not None]
        for entry, outcomes in self._outcomes(entries):
            progress.advance()
            for name, outcome in zip(self._single[entry.rollout.prompt.task], outcomes, strict=False):
                entry.put(name, outcome)
            if entry.failure is not None and id(entry) in wanted:
                failures.append(entry.failure)
                self._give_up(failures, most_failures)
        for name, having, answer in batches:
            values = answer.results() if isinstance(answer, PendingBatch) else answer
            for entry, value in zip(having, values, strict=True):
                entry.put(name, value)

    def _outcomes(self, entries: Sequence[_Entry]) -> Iterator[tuple[_Entry, Iterable[Outcome]]]:
        """Outcomes of the parts that are not batched, for each response in turn."""
        if self._workers is None:
            for entry in entries:
                if entry.call is not None:
                    yield entry, ask_in_turn(self._ask(entry), self._env.reward_options)
        while self._pending:
            pending, chunks = self._pending.pop(0)
            yield from zip(pending, (each for chunk in chunks for each in chunk.results()), strict=True)

    def _give_up(self, failures: Sequence[FailedReward], most_failures: int | None) -> None:
        """Raise where more rollouts have failed already than may, so that none waits for a thousand time limits."""
        if most_failures is None or len(failures) <= most_failures or failures[-1].bad_sample:
            return
        if self._workers is not None:
            self._workers.close()
        raise RewardError(
            failures_message(failures, f"{len(failures)} rewards, more than env.max_failed_rewards allows,")
        )


def score(
    rollouts: Sequence[Rollout],
    env: Env,
    *,
    response_format: str,
    max_response_tokens: int,
    overlong_buffer: int | None = None,
    overlong_weight: float | None = None,
    workers: RewardWorkers | None = None,
    on_bad_sample: Literal["error", "skip"] = "error",
) -> Rewards:
    """Compute the rewards of rollouts that are all there; see ``Scoring`` for arguments, returns and errors."""
    scoring = Scoring(
        env,
        response_format=response_format,
        max_response_tokens=max_response_tokens,
        overlong_buffer=overlong_buffer,
        overlong_weight=overlong_weight,
        workers=workers,
        on_bad_sample=on_bad_sample,
    )
    return scoring.rewards(rollouts)


def read(rollout: Rollout, env: Env, response_format: str) -> Response | FailedReward:
    """Read a rollout's response in the response format of its task; a failure if the format raises.

    Args:
        rollout: the rollout to read.
        env: the recipe's ``env`` section.
        response_format: name of the response format for tasks that name none.

    Raises:
        RewardError: a task that ``env.tasks`` lacks.
    """
    sample = rollout.prompt.sample
    if sample.task not in env.tasks:
        raise RewardError(f"sample {sample.key}: task {sample.task!r} is not listed under env.tasks; add it there")
    name = env.tasks[sample.task].response_format or response_format
    try:
        return response_formats.get(name).read(rollout)
    except Exception as error:  # noqa: BLE001 (a user's format may raise anything)
        where = f"response format {name!r} of sample {sample.key}, task {sample.task!r}, response"
        return FailedReward(part=RESPONSE_FORMAT, message=f"{where} {rollout.sample_index}: {raised(error)}")


def failures_message(failures: Sequence[FailedReward], what: str) -> str:
    """Return what is said where rewards failed: how many of each part, and the first of them.

    Args:
        failures: the failures, at least one.
        what: what has failed, the beginning of a sentence.
    """
    counts: dict[str, int] = {}
    for failure in failures:
        counts[failure.part] = counts.get(failure.part, 0) + 1
    by_part = ", ".join(f"{part} {count}" for part, count in counts.items())
    shown = [f"  {failure.message}" for failure in failures[:SHOWN_FAILURES]]
    return "\n".join([f"{what} could not be computed ({by_part}). The first:", *shown])


def _without(rewards: Rewards, failures: Mapping[int, FailedReward]) -> Rewards:
    """Return the rewards with NaN for every value of the rollouts that failed."""
    if not failures:
        return rewards
    rows = list(failures)
    for values in (*rewards.parts.values(), rewards.total):
        values[rows] = torch.nan
    return Rewards(parts=rewards.parts, weights=rewards.weights, total=rewards.total, failures=failures)
