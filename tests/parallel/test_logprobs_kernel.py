# SPDX-License-Identifier: Apache-2.0
"""Claim: with the vocabulary over two ranks, log-probabilities, entropies and gradients are those of one rank."""

from __future__ import annotations

from tests.common.compare import Report
from tests.common.launch import torchrun_json
from tests.parallel.logprobs_kernel_worker import TOLERANCES


def test_two_ranks_equal_one() -> None:
    """The kernel (padding, a rank with padding only, extreme logits, no labels, chunks, two collectives a row) and the
    output layer with and without sequence parallelism."""
    for worst in torchrun_json(2, "tests.parallel.logprobs_kernel_worker", timeout=120):
        Report(TOLERANCES, worst).assert_within_tolerance()
