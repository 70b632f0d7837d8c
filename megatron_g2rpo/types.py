# SPDX-License-Identifier: Apache-2.0
"""The types that all packages share: what flows through a training step.

A step passes the data on in this order (types without a module are defined here):

1. ``Sample``: one entry of the dataset, as ``data.shard_index`` reads it.
2. ``ModelInputs`` and ``Prompt``: the sample tokenised, its images as pixels (``data.processing``).
3. ``Rollout``: one sampled response to a prompt, from an engine (``rollout``).
4. ``Response``: the text of a rollout, read in its response format (``tasks.response_formats``).
5. ``Rewards``: the reward parts of all rollouts and their weighted sum (``tasks.scoring``).
6. ``objective.reward_batch.RewardBatch``: rewards with the ids of groups and tasks, which an advantage estimator reads;
   ``objective.sharded.ShardedAdvantages`` is its result over all ranks.
7. ``data.packing.PackSequence``: prompt and response of one rollout, with what the loss needs to know of them.
8. ``PackedBatch``: one micro-batch, which the packer makes of many sequences (``data.packing``).
9. ``TokenStats``: log-probabilities and entropies of a micro-batch under the policy (``policy``).
10. ``objective.surrogates.base.PolicyLoss``: the loss of each token of a micro-batch.

All are frozen: code that needs a changed one makes a new one. Shape letters: ``P`` prompt tokens, ``R`` response
tokens, ``S`` tokens of a packed row, ``N`` segments of a packed row (in ``Rewards``: rollouts), ``I`` images, ``V``
vision patches, ``D`` values per vision patch.

This module is in the lowest layer of the package: it imports torch and the standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

# A target that ``torch.nn.functional.cross_entropy`` would call ``ignore_index``: no token to predict.
NO_LABEL = -100

# The dtypes that ``policy.precision`` names.
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One entry of a dataset: its fields and images, nothing tokenised.

    Attributes:
        key: unique name of the sample in its dataset, ``<shard>/<sample>``; every error about it names it.
        task: task name (the one ``task_key`` that advantages, entropy and length shaping group by).
        question: the user's text; each ``<image>`` in it is the place of an image, and without any, images come first.
        answer: the reference answer, in the notation of ``answer_format``.
        answer_format: name of an answer format in ``tasks`` (``exact``, ``box_iou``, ...).
        images: RGB images, in the order in which they are shown. Those of a shard (``data.images.EncodedImages``) are
            decoded anew whenever one is taken; ask ``image_sizes`` for their sizes.
        resized_sizes: (width, height) in pixels of each image as the model gets it; empty until the sample is encoded.
        response: a full target response for supervised training; None where the dataset has none.
        extra: all further fields of the sample's json, unchanged, such as its provenance, or values that a user's
            answer format or reward part needs.
    """

    key: str
    task: str
    question: str
    answer: str
    answer_format: str
    images: Sequence[Any] = ()
    resized_sizes: Sequence[tuple[int, int]] = ()
    response: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def image_sizes(self) -> tuple[tuple[int, int], ...]:
        """Width and height in pixels of each image of the dataset, upright."""
        sizes = getattr(self.images, "sizes", None)
        return tuple(image.size for image in self.images) if sizes is None else sizes


@dataclass(frozen=True, kw_only=True)
class ModelInputs:
    """What the model reads for one prompt: the single output of the processor call.

    Attributes:
        token_ids: int64 ``[P]``; image placeholders are already expanded, one per merged patch.
        pixel_values: float32 ``[V, D]``; zero rows when there is no image.
        image_grid_thw: int64 ``[I, 3]`` (time, height, width), in patches before merging.
    """

    token_ids: Tensor
    pixel_values: Tensor
    image_grid_thw: Tensor


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A sample with its model inputs, ready for generation.

    Attributes:
        sample: the sample that the prompt asks.
        inputs: token ids and pixels of the prompt.
        task_id: number of the sample's task, the same on every rank: its place among the sorted names of the recipe's
            tasks. Advantages, entropy and metrics are told apart by it.
        response_prefix: beginning of the response that the chat template has already written: the text that the prompt
            ends with after the header of the assistant's turn, such as an opening ``<think>``.
    """

    sample: Sample
    inputs: ModelInputs
    task_id: int
    response_prefix: str = ""

    @property
    def key(self) -> str:
        return self.sample.key

    @property
    def task(self) -> str:
        return self.sample.task


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One sampled response.

    Attributes:
        prompt: the prompt that was answered.
        group_id: id of the prompt's group, unique in the global batch (all ranks).
        sample_index: index of this response in its group, 0-based.
        response_ids: int64 ``[R]``, the token included that ended it: an end-of-turn token, or the one that completed a
            stop string.
        logprobs: float32 ``[R]``, log-probability of each sampled token under the distribution that it was drawn from:
            *at the sampling temperature*, over the tokens that can be sampled.
        text: the decoded response without special tokens that end the turn; it ends with the stop string that ended it.
        truncated: True when the token limit ended the response, not an end-of-turn token or a stop string.
        kept_ids: int64 ``[R, K]``, the ids that each token was sampled from where filters left others out, -1 where
            there are fewer than K; None where all tokens could be sampled, or nobody asked.
    """

    prompt: Prompt
    group_id: int
    sample_index: int
    response_ids: Tensor
    logprobs: Tensor
    text: str
    truncated: bool
    kept_ids: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Number of tokens of prompt and response together."""
        return len(self.prompt.inputs.token_ids) + len(self.response_ids)


def task_ids_of(rollouts: Sequence[Rollout]) -> Tensor:
    """The task id of each rollout, int64 ``[N]``."""
    return torch.tensor([rollout.prompt.task_id for rollout in rollouts], dtype=torch.int64)


@dataclass(frozen=True, kw_only=True)
class Response:
    """A rollout's text, read in its response format: what a reward part sees of the rollout.

    Attributes:
        text: the decoded response without special tokens that end the turn.
        thinking: the reasoning in it, as the response format finds it; None if there is none.
        answer: the final answer in it, as the response format finds it; None if there is none.
        is_well_formed: whether the text follows the response format in full.
        num_tokens: response tokens, the one included that ended the response.
        truncated: True when the token limit ended the response, not an end-of-turn token or a stop string.
        sample_index: index of the response in its group, 0-based.
    """

    text: str
    thinking: str | None
    answer: str | None
    is_well_formed: bool
    num_tokens: int
    truncated: bool
    sample_index: int


@dataclass(frozen=True, kw_only=True)
class FailedReward:
    """Why a rollout has no reward.

    Attributes:
        part: name of the reward part that has no value, or ``response_format`` where the response could not be read.
        message: what happened, with the names of part, sample and task.
        bad_sample: whether the sample is the cause, whatever the response: its reference cannot be read.
    """

    part: str
    message: str
    bad_sample: bool = False


@dataclass(frozen=True, kw_only=True)
class Rewards:
    """Rewards of N rollouts: each part on its own, and the weighted sum of all parts.

    Attributes:
        parts: name -> float64 ``[N]`` (``accuracy``, ``format``, ``structure``, ``length``...), unweighted.
        weights: name -> float64 ``[N]``, weight of the part in each rollout's total: tasks may differ.
        total: float64 ``[N]``, their weighted sum, added up in this order: what the advantage is computed from.
        failures: index of a rollout -> why it has no reward. Its parts and its total are NaN, so that what forgets to
            leave it out shows.
    """

    parts: Mapping[str, Tensor]
    weights: Mapping[str, Tensor]
    total: Tensor
    failures: Mapping[int, FailedReward] = field(default_factory=dict)

    @property
    def failed(self) -> Tensor:
        """Which rollouts have no reward: bool ``[N]``. They belong neither to the loss nor to their group."""
        mask = torch.zeros(len(self.total), dtype=torch.bool)
        mask[list(self.failures)] = True
        return mask

    @classmethod
    def none(cls, n: int) -> Rewards:
        """Return the rewards of ``n`` rollouts before any part is computed: no parts, totals of 0."""
        return cls(parts={}, weights={}, total=torch.zeros(n, dtype=torch.float64))

    def __getitem__(self, rows: Tensor) -> Rewards:
        """Return the rewards of some rollouts: those that ``rows``, a tensor of indices or a bool mask, selects."""
        chosen = torch.arange(len(self.total))[rows].tolist()
        return Rewards(
            parts={name: part[rows] for name, part in self.parts.items()},
            weights={name: weight[rows] for name, weight in self.weights.items()},
            total=self.total[rows],
            failures={new: self.failures[old] for new, old in enumerate(chosen) if old in self.failures},
        )

    @classmethod
    def concatenate(cls, rewards: Sequence[Rewards]) -> Rewards:
        """Return the rewards of several lists of rollouts (at least one) as those of one list, in the given order."""
        first = rewards[0]
        starts = accumulate((len(each.total) for each in rewards), initial=0)
        return cls(
            parts={name: torch.cat([each.parts[name] for each in rewards]) for name in first.parts},
            weights={name: torch.cat([each.weights[name] for each in rewards]) for name in first.weights},
            total=torch.cat([each.total for each in rewards]),
            failures={
                start + index: failure
                for start, each in zip(starts, rewards, strict=False)
                for index, failure in each.failures.items()
            },
        )

    def plus(self, name: str, part: Tensor, weight: float | Tensor) -> Rewards:
        """Return these rewards with one more part, added to the total.

        Args:
            name: name of the part.
            part: float64 ``[N]``, value of the part for each rollout.
            weight: weight of the part in the total: one number for all rollouts, or float64 ``[N]``.
        """
        weights = weight if isinstance(weight, Tensor) else torch.full_like(self.total, weight)
        return Rewards(
            parts={**self.parts, name: part},
            weights={**self.weights, name: weights},
            total=self.total + weights * part,
            failures=self.failures,
        )


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """One micro-batch: one row of tokens, in which many sequences stand side by side.

    Position ``t`` predicts ``labels[t]``, the next token *of the same sequence*, where that is a response token; every
    other position has label ``NO_LABEL``. All per-token fields are aligned with the predicting position.
    The row consists of segments: a segment is a whole sequence, or a *trunk*, the prompt that several sequences share
    without its last token, or a *branch*, what one of them has of its own: the prompt's last token and the response
    without its last. A token attends to its own segment up to itself, and to all of the segment's parent: nothing else
    says who sees whom. A segment may be followed by padding: tokens that nothing attends to and nothing is learned
    from. A row is packed whole, and each context-parallel rank cuts its share out of every per-token field
    (``policy.layouts.context_parallel``).

    Attributes:
        tokens: int64 ``[S]``, ids of all tokens of the row.
        labels: int64 ``[S]``, the response token to predict; ``NO_LABEL`` where there is none.
        position_ids: int64 ``[3, S]``, mRoPE (time, height, width); restarts with every sequence, and goes on in every
            branch where its trunk ends.
        segment_ids: int64 ``[S]``, index of the segment a token belongs to (0..N-1); -1 on padding.
        cu_seqlens: int32 ``[N + 1]``, running sum of the segments' real lengths.
        cu_seqlens_padded: int32 ``[N + 1]``, where each segment begins in the (whole) row, padding counted.
        parents: int64 ``[N]``, index of the trunk that each segment continues; -1 for none.
        loss_mask: float32 ``[S]``, 1 where ``labels[t]`` is a response token that the loss counts.
        pixel_values: float32 ``[V, D]`` of the distinct images of the row: the samples of a group share one copy.
        image_grid_thw: int64 ``[I, 3]``, of the distinct images.
        vision_index: int64 ``[S]``, which merged feature of these images belongs at a token; -1 where none does.
        sequence_ids: int64 ``[N]``, index of each segment's sequence in the list that was packed; -1 for a trunk. Empty
            in a row of padding.
        task_ids: int64 ``[S]``, index of the task of each response token; -1 elsewhere.
        advantages: float32 ``[S]``, advantage of each response token; 0 outside the loss mask.
        behaviour_logprobs: float32 ``[S]``, what the rollout engine reported; 0 outside the response.
        old_logprobs: float32 ``[S]`` or None before the policy has computed them.
        reference_logprobs: float32 ``[S]`` under the reference policy, or None where there is none.
        importance_weights: float32 ``[S]``, factor of the surrogate's loss that corrects for what the rollout engine
            sampled from; None for 1.
        kept_ids: int64 ``[K, S]``, the ids that each label was sampled from, -1 where there are fewer than K: the
            policy's distribution at that place is over them alone. None for the whole vocabulary.
        token_weights: float32 ``[S]``; the loss is ``sum(weight * token_loss) / global token count``. Equal to
            ``loss_mask`` for token averaging.
    """

    tokens: Tensor
    labels: Tensor
    position_ids: Tensor
    segment_ids: Tensor
    cu_seqlens: Tensor
    cu_seqlens_padded: Tensor
    parents: Tensor
    loss_mask: Tensor
    pixel_values: Tensor
    image_grid_thw: Tensor
    vision_index: Tensor
    sequence_ids: Tensor
    task_ids: Tensor
    advantages: Tensor
    behaviour_logprobs: Tensor
    token_weights: Tensor
    old_logprobs: Tensor | None = None
    reference_logprobs: Tensor | None = None
    importance_weights: Tensor | None = None
    kept_ids: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """The number of tokens that the loss counts."""
        return int(self.loss_mask.sum().item())


@dataclass(frozen=True, kw_only=True)
class TokenStats:
    """Per-token statistics of a packed row under the policy.

    Attributes:
        logprobs: float32 ``[S]``, log-probability of ``labels`` at the given temperature (among
            ``PackedBatch.kept_ids``, where there are any); 0 where there is no label.
        entropy: float32 ``[S]``, entropy (nats) of the policy's distribution at the same temperature; 0 where there is
            no label.
    """

    logprobs: Tensor
    entropy: Tensor
