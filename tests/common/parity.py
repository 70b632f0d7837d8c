# SPDX-License-Identifier: Apache-2.0
"""Helpers of the parity tests: a global batch, a loss, and the values that transformers computes for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_g2rpo.data.packing import Packer, PackSequence
from megatron_g2rpo.policy.layouts.layout import Layout, token_multiples
from megatron_g2rpo.policy.megatron import LossTerms
from megatron_g2rpo.types import ModelInputs, PackedBatch, TokenStats
from tests.common.tiny_model import GRIDS, hf_logits, random_inputs, special_tokens

# fp32 over a few layers: sums in another order move the last bits of numbers around 1 to 10.
LOGPROB_TOLERANCE = 1e-5

TEMPERATURE = 0.8
TASKS = 2


# -- inputs -------------------------------------------------------------------------------------------------------


def random_sequences(config: Any, *, seed: int = 0, samples: int = 2, grids: Any = GRIDS) -> list[PackSequence]:
    """Return ``samples`` random responses of different lengths, one token included, to each prompt of ``grids``.

    Advantages, token weights, tasks and what the rollout engine reported differ from sequence to sequence.
    """
    generator = torch.Generator().manual_seed(seed)
    text = special_tokens(config.text_config.vocab_size).num_text
    sequences = []
    for prompt, inputs in enumerate(random_inputs(config, seed=seed, grids=grids)):
        for sample in range(samples):
            length = 1 + 5 * sample + prompt
            sequences.append(
                PackSequence(
                    inputs=inputs,
                    response_ids=torch.randint(text, (length,), generator=generator),
                    advantage=float(torch.randn((), generator=generator)),
                    task_id=prompt % TASKS,
                    behaviour_logprobs=-5 + torch.randn(length, generator=generator),
                    token_weight=0.5 + sample,
                )
            )
    return sequences


def parity_sequences(config: Any) -> list[PackSequence]:
    """Return the global batch of the parity check: 0, 1 or 2 images, odd and even lengths, one-token responses.

    The last two sequences are to have rows of their own: one without images, and one so short that no token of it
    falls to some context-parallel ranks. One sequence is kept out of the loss.
    """
    one, *others = random_sequences(config, grids=((), ((4, 6),), ((2, 4), (6, 4)), ()))
    short = torch.full((), -1.0)
    others[1] = replace(
        others[1], response_ids=others[1].response_ids[:1], behaviour_logprobs=others[1].behaviour_logprobs[:1]
    )
    others[3] = replace(others[3], in_loss=False)
    inputs = ModelInputs(
        token_ids=torch.tensor([3]), pixel_values=others[1].inputs.pixel_values[:0], image_grid_thw=GRID_OF_NONE
    )
    shortest = PackSequence(
        inputs=inputs, response_ids=torch.tensor([5]), advantage=1.5, task_id=1, behaviour_logprobs=5 * short[None]
    )
    return [one, *others, shortest]


GRID_OF_NONE = torch.zeros(0, 3, dtype=torch.int64)
ROWS_OF_THEIR_OWN = 2
ROW_TOKENS = 96


def packer_for(config: Any, layout: Layout | None = None, *, shared_prefix: bool = False) -> Packer:
    """Return a packer with the tiny model's tokens and the multiples that the layout needs."""
    tokens = special_tokens(config.text_config.vocab_size)
    sequence_multiple, row_multiple = token_multiples(layout or Layout())
    return Packer(
        image_token_id=tokens.image,
        spatial_merge_size=config.vision_config.spatial_merge_size,
        pad_token_id=tokens.pad,
        sequence_multiple=sequence_multiple,
        row_multiple=row_multiple,
        shared_prefix=shared_prefix,
    )


def sequences_by_rank(count: int, ranks: int, *, idle: bool) -> list[list[int]]:
    """Return which sequences each data-parallel rank owns: uneven on purpose, or all on the last rank (``idle``)."""
    if ranks == 1 or idle:
        return [[] for _ in range(ranks - 1)] + [list(range(count))]
    by_rank: list[list[int]] = [[] for _ in range(ranks)]
    for index in range(count):
        by_rank[0 if index % 3 == 0 else -1].append(index)
    return by_rank


def rows_of(
    packer: Packer, sequences: Sequence[PackSequence], by_rank: list[list[int]], rank: int
) -> list[PackedBatch]:
    """Return the micro-batches of one data-parallel rank, equally many on every rank; ``sequence_ids`` are global."""
    apart = range(len(sequences) - ROWS_OF_THEIR_OWN, len(sequences))

    def pack(owned: list[int], num_rows: int | None = None) -> list[PackedBatch]:
        together = [index for index in owned if index not in apart]
        alone = [[index] for index in owned if index in apart]
        packed: list[PackedBatch] = []
        for members, bins in (
            (together, None if num_rows is None else num_rows - len(alone)),
            *((a, 1) for a in alone),
        ):
            for batch in packer.pack([sequences[index] for index in members], ROW_TOKENS, bins):
                of_all = torch.tensor([*members, -1])  # a trunk, -1, is of no sequence
                packed.append(replace(batch, sequence_ids=of_all[batch.sequence_ids]))
        return packed

    num_rows = max(len(pack(owned)) for owned in by_rank)
    return pack(by_rank[rank], num_rows)


# -- loss ---------------------------------------------------------------------------------------------------------


def _token_loss(
    logprobs: Tensor, entropy: Tensor, rollout: Any, advantage: Any, weight: Any, mask: Any, task: Any
) -> Tensor:
    """Return the loss of each token: policy gradient and quadratic KL penalty, weighted, and a task's entropy bonus."""
    surrogate = -advantage * logprobs + 0.05 * (logprobs - rollout).square()
    return weight * surrogate + 0.1 * (1 + task) * mask * entropy


def toy_loss(batch: PackedBatch, stats: TokenStats) -> LossTerms:
    """Return a loss with the ingredients of the real ones; its metrics are entropy and token count of each task."""
    terms = _token_loss(
        stats.logprobs,
        stats.entropy,
        batch.behaviour_logprobs,
        batch.advantages,
        batch.token_weights,
        batch.loss_mask,
        batch.task_ids,
    )
    sums = {}
    for task in range(TASKS):
        mask = batch.loss_mask * (batch.task_ids == task)
        sums[f"entropy_{task}"] = (stats.entropy.detach() * mask).sum()
        sums[f"tokens_{task}"] = mask.sum()
    return LossTerms(loss=terms.sum(), num_tokens=batch.num_tokens, sums=sums)


# -- what transformers says ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Values:
    """One pass of transformers over the global batch, in the order of its sequences.

    Attributes:
        logprobs, entropies: float32 ``[R]`` for every response.
        loss: sum of ``toy_loss`` over all tokens, divided by the number of tokens that count.
        task_entropy: mean entropy over the tokens of each task.
        gradients: float32 gradients by Hugging Face name, accumulated in float32 sequence by sequence.
    """

    logprobs: list[Tensor]
    entropies: list[Tensor]
    loss: float
    task_entropy: list[float]
    gradients: dict[str, Tensor]

    @property
    def grad_norm(self) -> float:
        return float(torch.stack([gradient.norm() for gradient in self.gradients.values()]).norm())


def transformers_values(model: Any, sequences: Sequence[PackSequence], temperature: float = TEMPERATURE) -> Values:
    """Run transformers forward and backward on each sequence alone and unpadded, and return its values."""
    logprobs, entropies, gradients, loss = [], [], {}, 0.0
    sums, counts = [0.0] * TASKS, [0] * TASKS
    num_tokens = sum(len(sequence.response_ids) for sequence in sequences if sequence.in_loss)
    for sequence in sequences:
        start = len(sequence.inputs.token_ids) - 1
        logits = hf_logits(model, sequence.inputs, sequence.response_ids)[start:-1].float() / temperature
        log_p = logits.log_softmax(-1)
        logprob = log_p.gather(1, sequence.response_ids[:, None]).squeeze(1)
        entropy = -(log_p.exp() * log_p).sum(-1)
        logprobs.append(logprob.detach())
        entropies.append(entropy.detach())
        if not sequence.in_loss:
            continue
        rollout = 0.0 if sequence.behaviour_logprobs is None else sequence.behaviour_logprobs
        terms = _token_loss(logprob, entropy, rollout, sequence.advantage, sequence.token_weight, 1.0, sequence.task_id)
        model.zero_grad()
        (terms.sum() / num_tokens).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                gradients[name] = gradients.get(name, 0.0) + parameter.grad.float()
        loss += float(terms.detach().sum()) / num_tokens
        sums[sequence.task_id] += float(entropy.detach().sum())
        counts[sequence.task_id] += len(entropy)
    return Values(logprobs, entropies, loss, [s / max(c, 1) for s, c in zip(sums, counts, strict=True)], gradients)


def reference(model: Any, sequences: list[PackSequence], temperature: float) -> tuple[list[Tensor], list[Tensor]]:
    """Return transformers' log-probabilities and entropies of every response."""
    values = transformers_values(model, sequences, temperature)
    return values.logprobs, values.entropies
