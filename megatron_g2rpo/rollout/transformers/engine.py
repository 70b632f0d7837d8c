# SPDX-License-Identifier: Apache-2.0
"""The embedded default engine: Hugging Face transformers in the trainer's own process.

Each distinct prompt of a batch is prefilled once, and its images are encoded once. Its cache entry is then copied for
each response; the responses are decoded together and dropped as they finish. Prompts are padded on the *right*: with a
causal mask the prompt never attends to this padding, so prefill needs no mask. mRoPE positions are always given.

Shape letters: ``B`` sequences that are now decoded, ``N`` sequences of a batch at its start, ``P`` tokens of the
longest prompt, ``T`` new tokens, ``H`` hidden size, ``S`` tokens of a forward pass.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedConfig
from transformers.initialization import no_init_weights

from megatron_g2rpo import progress
from megatron_g2rpo.models.directory import load_config
from megatron_g2rpo.rollout import base
from megatron_g2rpo.rollout.stop_strings import Tail, read_response
from megatron_g2rpo.rollout.transformers.decoding import ATTENTION, PreallocatedCache
from megatron_g2rpo.rollout.transformers.sampling import draw, uniforms
from megatron_g2rpo.types import Prompt, Rollout
from megatron_g2rpo.weights.hf_model import model_class

# The cache grows by this many tokens, and finished sequences are dropped once they are this share of the batch: moving
# the cache costs about as much as one decoding step.
_FREE_TOKENS = 64
_DROP_SHARE = 0.15


class _Sequence(NamedTuple):
    """A response to generate: the index of its prompt in the call, and its index among the samples of this prompt."""

    prompt: int
    sample: int


class _Responses(NamedTuple):
    """What was decoded: tokens and their log-probabilities, each ``[N, T]``, and the lengths of the responses ``[N]``.

    A length includes the token that ended the response; what follows it is undefined. ``kept``, int64 ``[N, T, K]``,
    says what each token was drawn from, where that was asked for.
    """

    tokens: Tensor
    logprobs: Tensor
    lengths: Tensor
    kept: Tensor | None


@dataclass
class _Batch:
    """The sequences that are being decoded.

    Attributes:
        cache: keys and values of all tokens so far.
        free_tokens: number of tokens that fit into the cache before it must be moved.
        hidden: ``[B, H]``, hidden state at the last token.
        position: int64 ``[B]``, mRoPE position of the next token (the same in all three axes: it is text).
        visible: bool ``[B, P + T]``, False on the padding between a prompt and its response.
        sequence_ids: int64 ``[B]``, index of each of them in the list of sequences that the batch began with.
        running: bool ``[B]``, False once the token was drawn that ends the response.
    """

    cache: PreallocatedCache
    free_tokens: int
    hidden: Tensor
    position: Tensor
    visible: Tensor
    sequence_ids: Tensor
    running: Tensor

    def keep(self, index: Tensor, free_tokens: int) -> None:
        """Continue with the sequences at ``index``, in that order and as often as they occur there."""
        self.cache.keep(index, free_tokens)
        self.free_tokens = free_tokens
        for name in ("hidden", "position", "visible", "sequence_ids", "running"):
            setattr(self, name, getattr(self, name)[index])


@base.register("transformers")
class TransformersEngine:
    """A transformers model, Qwen-VL or text-only, that samples groups of responses.

    Args:
        model: Hugging Face directory or configuration. Only the configuration is read: weights come by
            ``load_weights``.
        device: the device that holds the model.
        dtype: data type of the parameters; rotary tables stay float32.
        eos_token_ids: tokens that end a response.
        pad_token_id: token that pads the prompts of a batch to equal length; nothing attends to it.
        banned_token_ids: tokens that are never sampled: image and video placeholders, and the tokens around them.
        decode: function from token ids to text.
        max_new_tokens: number of response tokens after which a response is truncated.
        batch_size: number of sequences that are decoded together.
    """

    def __init__(
        self,
        model: str | PathLike[str] | PreTrainedConfig,
        *,
        device: torch.device | str,
        dtype: torch.dtype,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        banned_token_ids: Sequence[int],
        decode: Callable[[Sequence[int]], str],
        max_new_tokens: int,
        batch_size: int,
    ) -> None:
        if max_new_tokens < 1 or batch_size < 1:
            raise ValueError(f"max_new_tokens ({max_new_tokens}) and batch_size ({batch_size}) must be at least 1")
        if not eos_token_ids or set(eos_token_ids) & set(banned_token_ids):
            raise ValueError(
                f"responses could not end: eos_token_ids {list(eos_token_ids)} must be non-empty and disjoint from "
                f"banned_token_ids {list(banned_token_ids)}"
            )
        self._device = torch.device(device)
        self._model = _empty_model(model, self._device, dtype)
        self._config = self._model.config
        vocab = self._config.get_text_config().vocab_size
        self._vision = getattr(self._config, "vision_config", None)
        outside = [i for i in (*eos_token_ids, pad_token_id, *banned_token_ids) if not 0 <= i < vocab]
        if outside:
            raise ValueError(f"special token ids {outside} lie outside the model's vocabulary of {vocab}")
        self._pad = pad_token_id
        self._eos_ids = frozenset(eos_token_ids)
        self._eos = torch.tensor(list(eos_token_ids), device=self._device)
        banned = set(banned_token_ids)
        self._allowed = torch.tensor([i for i in range(vocab) if i not in banned], device=self._device)
        self._decode_text = decode
        self._max_new_tokens = max_new_tokens
        self._batch_size = batch_size
        self._loaded = False

    @classmethod
    def build(cls, context: base.Context) -> TransformersEngine:
        generation = context.policy.generation
        return cls(
            context.policy.model_name,
            device=context.device,
            dtype=context.dtype,
            eos_token_ids=context.eos_token_ids,
            pad_token_id=context.pad_token_id,
            banned_token_ids=context.banned_token_ids,
            decode=context.decode,
            max_new_tokens=generation.max_new_tokens,
            batch_size=generation.batch_size,
        )

    def release(self) -> None:
        """Do nothing: the model is small beside the policy's optimizer, and a cache is freed with its batch."""

    @torch.no_grad()
    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Copy a stream of ``(Hugging Face checkpoint name, full tensor)`` into the model, in place.

        A tied output head may be left out, as checkpoints do; if it comes, it must equal the embedding.

        Raises:
            ValueError: a name is unknown, missing or given twice, or a shape differs. The engine then refuses to
                generate until a load succeeds, because its weights may be a mixture.
        """
        self._loaded = False
        slots = dict(self._model.named_parameters(remove_duplicate=False))
        received: set[str] = set()
        filled: dict[int, str] = {}
        for name, tensor in weights:
            slot = slots.get(name)
            if slot is None:
                raise ValueError(f"weight stream: {type(self._model).__name__} has no parameter {name!r}")
            if name in received:
                raise ValueError(f"weight stream: {name!r} was given twice")
            if tensor.shape != slot.shape:
                raise ValueError(
                    f"weight stream: {name!r} has shape {tuple(tensor.shape)}, the model expects {tuple(slot.shape)}"
                )
            twin = filled.setdefault(id(slot), name)
            if twin != name and not torch.equal(slot, tensor.to(slot)):
                raise ValueError(f"weight stream: {name!r} differs from {twin!r}, but this model ties the two")
            slot.copy_(tensor)
            received.add(name)
        missing = [name for name, _ in self._model.named_parameters() if name not in received]
        if missing:
            shown = ", ".join(missing[:5])
            raise ValueError(f"weight stream: {len(missing)} parameters were not given, among them {shown}")
        self._loaded = True

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Prompt],
        n: int,
        *,
        sampling: base.Sampling,
        seed: int,
        group_ids: Sequence[int],
        on_finished: base.OnFinished | None = None,
    ) -> list[Rollout]:
        """Sample ``n`` responses to each prompt; see ``base.Engine.generate``.

        The random draws are named by ``(seed, prompt.key, sample_index, position)``: a prompt that occurs twice under
        one key gets the same responses twice. Greedy responses report log-probabilities at temperature 1.

        Raises:
            RuntimeError: no weights were loaded, or the model's logits are not finite (the prompt is named).
            ValueError: arguments out of range, or a prompt's placeholders do not match its images (it is named).
        """
        if not self._loaded:
            raise RuntimeError("the rollout engine has no complete set of weights: call load_weights first")
        base.check_request(prompts, n, group_ids)
        for prompt in prompts:
            self._check_prompt(prompt)
        sequences = [_Sequence(p, s) for p in range(len(prompts)) for s in range(n)]
        # Neighbours in length share a batch; the longest come first, so that running out of memory happens at once.
        sequences.sort(key=lambda each: (-len(prompts[each.prompt].inputs.token_ids), each))
        rollouts: dict[_Sequence, Rollout] = {}
        for start in range(0, len(sequences), self._batch_size):
            together = sequences[start : start + self._batch_size]
            responses = self._respond(prompts, together, sampling, seed)
            for index, sequence in enumerate(together):
                length = int(responses.lengths[index])
                ids = responses.tokens[index, :length].clone()
                text, truncated = read_response(
                    ids.tolist(),
                    eos_token_ids=self._eos_ids,
                    stop_strings=sampling.stop_strings,
                    decode=self._decode_text,
                )
                rollouts[sequence] = Rollout(
                    prompt=prompts[sequence.prompt],
                    group_id=group_ids[sequence.prompt],
                    sample_index=sequence.sample,
                    response_ids=ids,
                    logprobs=responses.logprobs[index, :length].clone(),
                    text=text,
                    truncated=truncated,
                    kept_ids=None if responses.kept is None else responses.kept[index, :length].clone(),
                )
            if on_finished is not None:
                on_finished([rollouts[sequence] for sequence in together])
        return [rollouts[sequence] for sequence in sorted(rollouts)]

    def _check_prompt(self, prompt: Prompt) -> None:
        inputs = prompt.inputs
        patches = int(inputs.image_grid_thw.prod(-1).sum())
        if self._vision is None:
            if patches:
                raise ValueError(f"prompt {prompt.key!r} has images, but {type(self._model).__name__} reads text alone")
            return
        expected = patches // self._vision.spatial_merge_size**2
        placeholders = int((inputs.token_ids == self._config.image_token_id).sum())
        if len(inputs.token_ids) == 0 or placeholders != expected or len(inputs.pixel_values) != patches:
            raise ValueError(
                f"prompt {prompt.key!r}: its {len(inputs.token_ids)} tokens hold {placeholders} image placeholders "
                f"where its image grids ask for {expected}, and it has {len(inputs.pixel_values)} of {patches} patches"
            )

    def _respond(
        self, prompts: Sequence[Prompt], sequences: list[_Sequence], sampling: base.Sampling, seed: int
    ) -> _Responses:
        """Decode one batch; sequences of the same prompt share its prefill. Returns tensors on the CPU."""
        limit = self._max_new_tokens
        uniform = None
        if sampling.temperature > 0:
            numbers = [uniforms(seed, prompts[each.prompt].key, each.sample, limit) for each in sequences]
            uniform = torch.stack(numbers).to(self._device)
        tokens = torch.zeros(len(sequences), limit, dtype=torch.int64, device=self._device)
        logprobs = torch.zeros(len(sequences), limit, device=self._device)
        lengths = torch.full((len(sequences),), limit, device=self._device)
        stops = sampling.stop_strings
        tails = [Tail(stops, self._decode_text) for _ in sequences] if stops else []
        kept: list[Tensor] = []
        batch = self._prefill(prompts, sequences)
        for step in range(limit):
            logits = self._model.lm_head(batch.hidden)
            self._check_finite(logits, prompts, sequences, batch.sequence_ids, step)
            number = None if uniform is None else uniform[batch.sequence_ids, step]
            drawn = draw(logits, number, sampling=sampling, allowed=self._allowed)
            tokens[batch.sequence_ids, step] = drawn.tokens
            logprobs[batch.sequence_ids, step] = drawn.logprobs.float()
            if drawn.kept is not None:
                of_all = drawn.kept.new_full((len(sequences), drawn.kept.shape[1]), -1)
                kept.append(of_all.index_copy(0, batch.sequence_ids, drawn.kept).t().cpu())
            ended = torch.isin(drawn.tokens, self._eos)
            if tails:
                ended |= self._stopped(batch, drawn.tokens, ended, tails)
            ended &= batch.running
            lengths[batch.sequence_ids] = torch.where(ended, step + 1, lengths[batch.sequence_ids])
            batch.running &= ~ended
            running = int(batch.running.sum())  # a wait for the GPU, the only one beside the check of the logits
            progress.advance()
            if step + 1 == limit or not running:
                break
            self._advance(batch, drawn.tokens, running, limit - step - 1)
        # [T, K, N], as pad_sequence wants it: the number of tokens that are kept differs from step to step.
        drawn_from = pad_sequence(kept, batch_first=True, padding_value=-1).permute(2, 0, 1) if kept else None
        return _Responses(tokens.cpu(), logprobs.cpu(), lengths.cpu(), drawn_from)

    def _stopped(self, batch: _Batch, tokens: Tensor, ended: Tensor, tails: list[Tail]) -> Tensor:
        """Return bool ``[B]``: which of the drawn ``tokens [B]``, no end tokens, complete a stop string."""
        going = (batch.running & ~ended).tolist()
        rows = zip(going, batch.sequence_ids.tolist(), tokens.tolist(), strict=True)
        return torch.tensor([on and tails[each].completes(token) for on, each, token in rows], device=self._device)

    def _prefill(self, prompts: Sequence[Prompt], sequences: list[_Sequence]) -> _Batch:
        """Prefill the distinct prompts, padded on the right, and give every sequence a copy of its prompt's cache."""
        distinct = list(dict.fromkeys(each.prompt for each in sequences))
        inputs = [prompts[p].inputs for p in distinct]
        ids = pad_sequence([i.token_ids for i in inputs], batch_first=True, padding_value=self._pad).to(self._device)
        lengths = torch.tensor([len(i.token_ids) for i in inputs], device=self._device)
        visible = torch.arange(ids.shape[1], device=self._device) < lengths[:, None]
        images = {}
        if any(len(i.image_grid_thw) for i in inputs):
            images["pixel_values"] = torch.cat([i.pixel_values for i in inputs]).to(self._device)
            images["image_grid_thw"] = torch.cat([i.image_grid_thw for i in inputs]).to(self._device)
        positions, delta = self._positions(ids, visible, images.get("image_grid_thw"))
        cache = PreallocatedCache()
        hidden = self._forward(ids, positions, None, cache, **images)
        last = torch.arange(len(distinct), device=self._device)
        batch = _Batch(
            cache=cache,
            free_tokens=0,
            hidden=hidden[last, lengths - 1],
            position=lengths + delta,
            visible=torch.nn.functional.pad(visible, (0, self._max_new_tokens), value=True),
            sequence_ids=last,
            running=torch.ones_like(last, dtype=torch.bool),
        )
        place = {p: index for index, p in enumerate(distinct)}
        source = torch.tensor([place[each.prompt] for each in sequences], device=self._device)
        batch.keep(source, min(self._max_new_tokens, _FREE_TOKENS))
        batch.sequence_ids = torch.arange(len(sequences), device=self._device)
        return batch

    def _advance(self, batch: _Batch, tokens: Tensor, running: int, tokens_left: int) -> None:
        """Feed the drawn ``tokens [B]`` to the model, after dropping finished sequences where that saves time.

        Args:
            batch: the sequences; changed in place.
            tokens: int64 ``[B]``, the last token of each.
            running: number of sequences that go on.
            tokens_left: number of tokens that may still be drawn for each sequence.
        """
        if batch.free_tokens == 0 or running <= (1 - _DROP_SHARE) * len(tokens):
            index = batch.running.nonzero()[:, 0]
            tokens = tokens[index]
            batch.keep(index, min(tokens_left, _FREE_TOKENS))
        batch.free_tokens -= 1
        mask = batch.visible[:, None, None, : batch.cache.get_seq_length() + 1]
        positions = batch.position[:, None]
        if self._vision is not None:
            positions = positions.expand(3, -1, -1)
        batch.hidden = self._forward(tokens[:, None], positions, mask, batch.cache)[:, 0]
        batch.position = batch.position + 1

    def _positions(self, ids: Tensor, visible: Tensor, image_grid_thw: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the positions of prompts ``[B, P]``, and int64 ``[B]``: position minus place of the next token."""
        if self._vision is None:
            return torch.arange(ids.shape[1], device=ids.device).expand_as(ids), torch.zeros_like(ids[:, 0])
        positions, delta = self._model.model.get_rope_index(
            ids,
            mm_token_type_ids=(ids == self._config.image_token_id).int(),
            image_grid_thw=image_grid_thw,
            attention_mask=visible,
        )
        return positions, delta[:, 0]

    def _forward(
        self, ids: Tensor, positions: Tensor, mask: Tensor | None, cache: PreallocatedCache, **images
    ) -> Tensor:
        """Return hidden states ``[B, S, H]`` of tokens ``[B, S]``; positions are ``[B, S]``, mRoPE's ``[3, B, S]``."""
        return self._model.model(
            input_ids=ids,
            position_ids=positions,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            **images,
        ).last_hidden_state

    def _check_finite(
        self, logits: Tensor, prompts: Sequence[Prompt], sequences: list[_Sequence], sequence_ids: Tensor, step: int
    ) -> None:
        finite = logits.isfinite().all(-1)
        if not finite.all():
            sequence = sequences[int(sequence_ids[~finite][0])]
            raise RuntimeError(
                f"prompt {prompts[sequence.prompt].key!r}, sample {sequence.sample}, response token {step}: the "
                "model's logits are not finite; the weights have diverged or overflow in this dtype"
            )


def _empty_model(model: str | PathLike[str] | PreTrainedConfig, device: torch.device, dtype: torch.dtype):
    """Build the model with uninitialised parameters, in eval mode; buffers are computed, not read."""
    config = copy.deepcopy(model) if isinstance(model, PreTrainedConfig) else load_config(model)
    # Not `.to(dtype)`: that would also round the rotary tables, which the constructor keeps in fp32.
    with device, no_init_weights():
        built = model_class(config).from_config(
            config, dtype=dtype, attn_implementation=ATTENTION, trust_remote_code=False
        )
    built.tie_weights()
    return built.eval().requires_grad_(False)
