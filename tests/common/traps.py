# SPDX-License-Identifier: Apache-2.0
"""Helpers of the tests of traps: deliberate mistakes that raise no error, but that the parity tests must detect.

A trap is made in a policy that is right otherwise, and what the parity tests compare is measured. It counts as detected
when it exceeds their tolerance ``MARGIN`` times over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_g2rpo.data.packing import Packer, PackSequence, response_values
from megatron_g2rpo.policy.megatron import Loss, MegatronPolicy
from megatron_g2rpo.types import PackedBatch
from tests.common.compare import Report, largest_error, relative_distance
from tests.common.parity import (
    LOGPROB_TOLERANCE,
    TEMPERATURE,
    Values,
    packer_for,
    parity_sequences,
    rows_of,
    sequences_by_rank,
    toy_loss,
    transformers_values,
)
from tests.common.tiny_model import make_tiny_qwen3vl

MARGIN = 100
TOLERANCES = {"logprob": LOGPROB_TOLERANCE, "entropy": LOGPROB_TOLERANCE, "loss": 1e-5, "gradient": 1e-5}
# Tied, with deepstack features for the first two layers; two tensor-parallel ranks pad the vocabulary by a row.
SHAPE = {"layers": 4, "vocab": 161}


@dataclass(frozen=True)
class Baseline:
    """A model, a global batch, and the values that transformers computes for it."""

    directory: Path
    sequences: list[PackSequence]
    expected: Values

    @classmethod
    def make(cls, directory: Path, sequences: list[PackSequence] | None = None) -> Baseline:
        """Write a model to ``directory`` and run transformers; None for the global batch of the parity tests."""
        config, model = make_tiny_qwen3vl(directory, **SHAPE)
        sequences = parity_sequences(config) if sequences is None else sequences
        return cls(directory, sequences, transformers_values(model, sequences))

    def save(self) -> None:
        """Write the baseline beside the model, for the ranks of a worker."""
        torch.save(self, self.directory / "baseline.pt")

    @staticmethod
    def load(directory: Path) -> Baseline:
        return torch.load(directory / "baseline.pt", weights_only=False)

    def rows(self, policy: MegatronPolicy, packer: Packer | None = None, *, idle: bool = False) -> list[PackedBatch]:
        """Return this data-parallel rank's packed rows; ``idle`` gives all sequences to the last rank."""
        by_rank = sequences_by_rank(len(self.sequences), policy.groups.data_size, idle=idle)
        packer = packer or packer_for(policy.hf_config, policy.layout)
        return rows_of(packer, self.sequences, by_rank, policy.groups.data_rank)


def measure(
    policy: MegatronPolicy, baseline: Baseline, batches: Sequence[PackedBatch] | None = None, loss: Loss = toy_loss
) -> Report:
    """Return the errors against transformers over all ranks, as the parity tests compare them before an update.

    Args:
        policy: the policy to measure.
        baseline: the expected values.
        batches: this rank's packed rows, made of the baseline's sequences; None for ``baseline.rows``.
        loss: loss to use instead of ``toy_loss``, whose value and gradients are expected.
    """
    batches = baseline.rows(policy) if batches is None else batches
    errors, expected = Report(TOLERANCES), baseline.expected
    for batch, stats in zip(batches, policy.logprobs(batches, TEMPERATURE), strict=True):
        for kind, ours, theirs in (
            ("logprob", stats.logprobs, expected.logprobs),
            ("entropy", stats.entropy, expected.entropies),
        ):
            for index, values in response_values(batch, ours).items():
                errors.note(kind, largest_error(values, theirs[index]), f"sequence {index}")
    errors.note("loss", abs(policy.gradients(batches, loss, TEMPERATURE)["loss"] / expected.loss - 1))
    for name, gradient in policy.stream(lambda parameter: parameter.main_grad):
        errors.note("gradient", relative_distance(gradient, expected.gradients[name]), name)
    return errors.over_all_ranks()
