# SPDX-License-Identifier: Apache-2.0
"""Claims: an update moves weights down the loss; a gradient that is not finite moves none."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_g2rpo.policy.device import select
from megatron_g2rpo.policy.megatron import Loss, LossTerms, MegatronPolicy
from megatron_g2rpo.types import PackedBatch, TokenStats
from tests.common.parity import packer_for, random_sequences
from tests.common.policy_layout import policy_section
from tests.common.tiny_model import make_tiny_qwen3vl


def _nll(batch: PackedBatch, stats: TokenStats) -> LossTerms:
    loss = -(stats.logprobs * batch.loss_mask).sum()
    return LossTerms(loss=loss, num_tokens=batch.num_tokens, sums={"ones": batch.loss_mask.sum()})


def test_updates_lower_the_loss_and_metrics_are_token_means(tmp_path: Path) -> None:
    config, _ = make_tiny_qwen3vl(tmp_path)
    policy = MegatronPolicy(policy_section(tmp_path), select("cpu"), seed=0, max_steps=10)
    sequences = random_sequences(config)
    batches = packer_for(config).pack(sequences, budget=80)
    results = [policy.update(batches, _nll) for _ in range(3)]
    losses = [result["loss"] for result in results]
    assert losses[0] > losses[1] > losses[2]
    assert results[0]["ones"] == 1.0
    assert results[0]["num_tokens"] == sum(len(sequence.response_ids) for sequence in sequences)


def test_a_gradient_that_is_not_finite_changes_no_weight(tmp_path: Path) -> None:
    config, _ = make_tiny_qwen3vl(tmp_path)
    policy = MegatronPolicy(policy_section(tmp_path), select("cpu"), seed=0, max_steps=10)
    batches = packer_for(config).pack(random_sequences(config), budget=80)
    before = {name: tensor.clone() for name, tensor in policy.stream()}

    def poisoned(batch: PackedBatch, stats: TokenStats) -> LossTerms:
        terms = _nll(batch, stats)
        return LossTerms(loss=terms.loss * float("nan"), num_tokens=terms.num_tokens, sums={})

    with pytest.raises(FloatingPointError, match="no optimizer step was taken"):
        policy.update(batches, poisoned)
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.stream())


def test_an_update_that_is_skipped_changes_neither_weights_nor_schedule_and_the_next_is_as_if_it_had_not_been(
    tmp_path: Path,
) -> None:
    """Bit for bit: a policy that skipped an update goes on as one that was never asked for it."""
    config, _ = make_tiny_qwen3vl(tmp_path)
    batches = packer_for(config).pack(random_sequences(config), budget=80)
    asked: list[tuple[float, float]] = []

    def poisoned(batch: PackedBatch, stats: TokenStats) -> LossTerms:
        terms = _nll(batch, stats)
        return LossTerms(loss=terms.loss * float("nan"), num_tokens=terms.num_tokens, sums={**terms.sums})

    def skips(loss: float, grad_norm: float) -> bool:
        asked.append((loss, grad_norm))
        return not math.isfinite(grad_norm)

    def run(*losses: Loss) -> tuple[list[dict[str, float]], dict[str, Tensor]]:
        policy = MegatronPolicy(policy_section(tmp_path), select("cpu"), seed=0, max_steps=10)
        results = [policy.update(batches, loss, skips=skips) for loss in losses]
        return results, {name: tensor.clone() for name, tensor in policy.stream()}

    (first, skipped, second), weights = run(_nll, poisoned, _nll)
    expected, of_expected = run(_nll, _nll)
    assert [first, second] == expected
    assert first["skipped_updates"] == 0.0
    assert all(torch.equal(tensor, of_expected[name]) for name, tensor in weights.items())
    assert skipped["skipped_updates"] == 1.0
    assert "grad_norm" not in skipped
    assert all(math.isfinite(value) for value in skipped.values()), skipped
    assert math.isnan(asked[1][1])


def test_metrics_that_some_micro_batches_lack_are_refused(tmp_path: Path) -> None:
    """The sums of a metric that only some report would be of other tokens, or another metric's (a peer hangs on it)."""
    config, _ = make_tiny_qwen3vl(tmp_path)
    policy = MegatronPolicy(policy_section(tmp_path), select("cpu"), seed=0, max_steps=10)
    batches = packer_for(config).pack(random_sequences(config), budget=80)
    assert len({bool((batch.task_ids == 1).any()) for batch in batches}) == 2, "task 1 should be in some rows only"

    def sometimes(batch: PackedBatch, stats: TokenStats) -> LossTerms:
        terms = _nll(batch, stats)
        present = {"task_1": terms.loss.detach()} if bool((batch.task_ids == 1).any()) else {}
        return LossTerms(loss=terms.loss, num_tokens=terms.num_tokens, sums={**terms.sums, **present})

    with pytest.raises(ValueError, match=r"the same metrics in every micro-batch .*\['task_1'\]"):
        policy.update(batches, sometimes)
