# SPDX-License-Identifier: Apache-2.0
"""Traps: mistakes that raise no error. The common ground of the tests that make them on purpose.

A trap is made in a policy that is right otherwise, and what the parity tests compare is measured. It counts as seen
when it exceeds their tolerance ``MARGIN`` times over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_g2rpo.data.packing import Packer, PackSequence, response_values
from megatron_g2rpo.policy.megatron import Loss, MegatronPolicy
from megatron_g2rpo.types import PackedBatch
from tests.common.parity import (
    LOGPROB_TOLERANCE,
    TEMPERATURE,
    Values,
    deal,
    packer_for,
    parity_sequences,
    rows_of,
    toy_loss,
    transformers_values,
)
from tests.common.tiny_model import make_tiny_qwen3vl

MARGIN = 100
TOLERANCES = {"logprob": LOGPROB_TOLERANCE, "entropy": LOGPROB_TOLERANCE, "loss": 1e-5, "gradient": 1e-5}
# Tied, with deepstack features for the first two layers; two tensor-parallel ranks pad the vocabulary by a row.
SHAPE = {"layers": 4, "vocab": 161}


@dataclass(frozen=True)
class Scene:
    """A model, a global batch, and what transformers says of it."""

    directory: Path
    sequences: list[PackSequence]
    expected: Values

    @classmethod
    def make(cls, directory: Path, sequences: list[PackSequence] | None = None) -> Scene:
        """Write a model to ``directory`` and run transformers; None for the global batch of the parity tests."""
        config, model = make_tiny_qwen3vl(directory, **SHAPE)
        sequences = parity_sequences(config) if sequences is None else sequences
        return cls(directory, sequences, transformers_values(model, sequences))

    def save(self) -> None:
        torch.save(self, self.directory / "scene.pt")

    @staticmethod
    def load(directory: Path) -> Scene:
        return torch.load(directory / "scene.pt", weights_only=False)

    def rows(self, policy: MegatronPolicy, packer: Packer | None = None, *, idle: bool = False) -> list[PackedBatch]:
        """This data-parallel rank's rows; ``idle`` gives all sequences to the last rank."""
        hands = deal(len(self.sequences), policy.groups.data_size, idle=idle)
        packer = packer or packer_for(policy.hf_config, policy.layout)
        return rows_of(packer, self.sequences, hands, policy.groups.data_rank)


@dataclass
class Errors:
    """The largest error of each kind, and where it is.

    Of log-probabilities and entropies in nats, relative to values above one; of the loss relative; of gradients
    ``||ours - theirs|| / ||theirs||``.
    """

    worst: dict[str, tuple[float, str]] = field(default_factory=dict)

    def note(self, kind: str, error: float, where: str = "") -> None:
        if kind not in self.worst or not error <= self.worst[kind][0]:
            self.worst[kind] = (error, where)

    def __str__(self) -> str:
        return ", ".join(f"{kind} {error:.1e} ({where})" for kind, (error, where) in self.worst.items())

    def assert_seen(self, *kinds: str, margin: float = MARGIN) -> None:
        """Each of these exceeds its tolerance ``margin`` times over (one that is no number does)."""
        for kind in kinds:
            assert not self.worst[kind][0] <= margin * TOLERANCES[kind], f"{kind} is not seen: {self}"

    def assert_none(self) -> None:
        """Nothing exceeds its tolerance."""
        for kind, (error, _) in self.worst.items():
            assert error <= TOLERANCES[kind], f"{kind}: {self}"


def measure(
    policy: MegatronPolicy, scene: Scene, batches: Sequence[PackedBatch] | None = None, loss: Loss = toy_loss
) -> Errors:
    """Errors against transformers over all ranks: what the parity tests compare before the first update.

    Args:
        batches: this rank's rows, made of the scene's sequences; None for ``scene.rows``.
        loss: used in place of ``toy_loss``, whose value and gradients are expected.
    """
    batches = scene.rows(policy) if batches is None else batches
    errors, expected = Errors(), scene.expected
    for batch, stats in zip(batches, policy.logprobs(batches, TEMPERATURE), strict=True):
        for kind, ours, theirs in (
            ("logprob", stats.logprobs, expected.logprobs),
            ("entropy", stats.entropy, expected.entropies),
        ):
            for index, values in response_values(batch, ours).items():
                difference = (values - theirs[index]).abs() / theirs[index].abs().clamp(min=1)
                errors.note(kind, float(difference.max()), f"sequence {index}")
    errors.note("loss", abs(policy.gradients(batches, loss, TEMPERATURE)["loss"] / expected.loss - 1))
    for name, gradient in policy.stream(lambda parameter: parameter.main_grad):
        errors.note("gradient", relative(gradient, expected.gradients[name]), name)
    return over_all_ranks(errors)


def relative(ours: Tensor, theirs: Tensor) -> float:
    """``||ours - theirs|| / ||theirs||``."""
    return float((ours - theirs).norm() / theirs.norm())


def over_all_ranks(errors: Errors) -> Errors:
    """The largest of any rank, on every rank."""
    everyone: list[Errors] = [errors] * dist.get_world_size()
    dist.all_gather_object(everyone, errors)
    merged = Errors()
    for other in everyone:
        for kind, (error, where) in other.worst.items():
            merged.note(kind, error, where)
    return merged
