# SPDX-License-Identifier: Apache-2.0
"""What a step's passes computed, what sharing saved of it, and how fast it went, over all ranks.

Only what was computed counts: a prompt that responses share once, an image once however many passes read its features,
and neither padding nor what is recomputed in backward passes. Generation is not among it: an engine says itself what it
did.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import astuple, dataclass

import torch
import torch.distributed as dist

from megatron_g2rpo.collectives import all_reduce
from megatron_g2rpo.models import flops
from megatron_g2rpo.models.cards import Card, card_of
from megatron_g2rpo.models.flops import Shape
from megatron_g2rpo.policy.device import hardware
from megatron_g2rpo.policy.megatron import MegatronPolicy
from megatron_g2rpo.policy.vision import VisionWork
from megatron_g2rpo.policy.work import RowWork

# Phases of a step in which the policy computes; see ``step.timers``.
PHASES = ("logprobs", "task_gradients", "update")


@dataclass(frozen=True, kw_only=True)
class PolicyWork:
    """What the policy computed in a step, summed over all replicas.

    Attributes:
        forward: rows of passes without gradient.
        trained: rows of passes that a backward pass follows.
        vision: what vision towers did.
    """

    forward: RowWork
    trained: RowWork
    vision: VisionWork

    def model_flops(self, shape: Shape) -> float:
        """Floating-point operations of the model; a backward pass has twice those of a forward pass.

        Args:
            shape: the model.
        """
        vision = self.vision
        return (
            _flops(shape, self.forward)
            + 3 * _flops(shape, self.trained)
            + flops.vision(shape, patches=vision.encoded, pairs=vision.encoded_pairs)
            + 2 * flops.vision(shape, patches=vision.learnt, pairs=vision.learnt_pairs)
        )

    def metrics(self) -> dict[str, float]:
        """``work/...``: tokens and patches, see docs/metrics.md."""
        rows = self.forward + self.trained
        return {
            "work/tokens": float(rows.tokens),
            "work/tokens_saved": float(rows.saved),
            "work/padding_tokens": float(rows.padding),
            "work/logprob_tokens": float(self.forward.tokens),
            "work/logit_tokens": float(rows.labels),
            "work/vision_patches": float(self.vision.encoded),
            "work/vision_patches_saved": float(self.vision.known + self.vision.repeated),
        }


class WorkMeter:
    """Measures the work of one step.

    Args:
        policy: the policy, before the step.
    """

    def __init__(self, policy: MegatronPolicy) -> None:
        self._policy = policy
        self._forward, self._trained = policy.work.forward, policy.work.trained
        self._vision = copy(policy.model.vision_work)

    def work(self) -> PolicyWork:
        """What all ranks computed since the meter was made. A collective of all ranks."""
        policy = self._policy
        # Model-parallel ranks work on the same rows: the first of each replica counts them. Images are shared out.
        mine = float(policy.groups.model_rank == 0)
        rows = [policy.work.forward - self._forward, policy.work.trained - self._trained]
        now, before = astuple(policy.model.vision_work), astuple(self._vision)
        counts = torch.tensor(
            [
                *(mine * value for row in rows for value in astuple(row)),
                *(after - earlier for after, earlier in zip(now, before, strict=True)),
            ],
            dtype=torch.float64,
        )
        all_reduce(counts)
        values = counts.tolist()
        size = len(astuple(rows[0]))
        return PolicyWork(
            forward=_row_work(values[:size]),
            trained=_row_work(values[size : 2 * size]),
            vision=VisionWork(*(int(value) for value in values[2 * size :])),
        )


def work_metrics(
    meter: WorkMeter, policy: MegatronPolicy, seconds: Mapping[str, float], sequence_tokens: int
) -> dict[str, float]:
    """``work/...`` and ``speed/...`` of a step, see docs/metrics.md. A collective of all ranks.

    Args:
        meter: made before the step.
        policy: the policy.
        seconds: seconds of each phase of the step on this rank.
        sequence_tokens: tokens of prompts and responses of this data-parallel rank's sequences in the step.
    """
    work = meter.work()
    tokens = torch.tensor([sequence_tokens * (policy.groups.model_rank == 0)])
    all_reduce(tokens)
    computing = sum(seconds.get(phase, 0.0) for phase in PHASES)
    rate = work.model_flops(policy.shape) / computing / dist.get_world_size()
    card = card_of(hardware(policy.device).name)
    return {
        **work.metrics(),
        "speed/tokens_per_second": float(tokens) / sum(seconds.values()),
        "speed/model_tflops_per_second": rate / 1e12,
        **({} if card is None else {"speed/mfu": rate / _peak(card, policy)}),
    }


def _peak(card: Card, policy: MegatronPolicy) -> float:
    """Operations a second of the card in the policy's precision; FP8 counts as bfloat16, as in ``plan``."""
    return card.fp32 if policy.dtype == torch.float32 else card.bf16


def _flops(shape: Shape, rows: RowWork) -> float:
    return flops.forward(
        shape, tokens=rows.tokens, pairs=rows.pairs, labels=rows.labels, images=0, image_tokens=0
    ).total


def _row_work(values: list[float]) -> RowWork:
    tokens, padding, saved, pairs, labels = values
    return RowWork(tokens=int(tokens), padding=int(padding), saved=int(saved), pairs=pairs, labels=int(labels))
