# SPDX-License-Identifier: Apache-2.0
"""One rank of the data-parallelism test: every mode against the plain one. Usage: DIRECTORY TENSOR PIPELINE CONTEXT."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_g2rpo.policy import optimizer as policy_optimizer
from megatron_g2rpo.policy.megatron import MegatronPolicy
from megatron_g2rpo.policy.reference_policy import ReferencePolicy
from tests.common.compare import Report, largest_difference, largest_distance, total_distance
from tests.common.hardware import this_device
from tests.common.launch import report_result
from tests.common.parity import toy_loss
from tests.common.policy_layout import DATA_PARALLELISM, layout_options
from tests.parallel.checkpoint_layouts_worker import BUCKET, micro_batches, weights_of

STEPS = 3
# Gradients are summed in another order: whole buffers or buckets, all-reduced or reduce-scattered. For the update, see
# checkpoint_layouts_worker.
TOLERANCES = {"norm": 1e-5, "logprob": 1e-5, "gradient": 1e-5, "update": 1e-3}


RECOMPUTE = "distributed-overlap-gather with full recomputation"


def build(directory: Path, sizes: tuple[int, int, int], mode: str) -> MegatronPolicy:
    tp, pp, cp = sizes
    mode, _, recompute = mode.partition(" ")
    options = layout_options(
        directory, tp=tp, pp=pp, cp=cp, mode=mode, recompute_granularity="full" if recompute else None
    )
    return MegatronPolicy(options, this_device(), seed=0, max_steps=10)


def run(policy: MegatronPolicy) -> dict[str, Any]:
    """Gradients of a minibatch; norm and log-probabilities after each step on it; weights before and after."""
    assert policy._ddp is not None
    batches = micro_batches(policy)
    start = weights_of(policy)
    policy.gradients(batches, toy_loss)
    with policy.device.megatron():
        policy_optimizer.gather_gradients(policy._ddp)
    gradients = {name: grad.clone() for name, grad in policy.stream(lambda parameter: parameter.main_grad)}
    reference, initial = ReferencePolicy(policy), policy.logprobs(batches)
    norms, logprobs = [], []
    for _ in range(STEPS):
        norms.append(policy.update(batches, toy_loss)["grad_norm"])
        # Forward passes without backward, just after a step: the weights must be the new ones.
        logprobs += [stats.logprobs for stats in policy.logprobs(batches)]
        # The reference takes the weights' place and gives it back, wherever the optimizer keeps its shares.
        held = reference.logprobs(batches)
        assert all(torch.equal(a.logprobs, b.logprobs) for a, b in zip(held, initial, strict=True))
    return {"start": start, "gradients": gradients, "norms": norms, "logprobs": logprobs, "end": weights_of(policy)}


def compare(plain: dict[str, Any], result: dict[str, Any]) -> Report:
    report = Report(TOLERANCES)
    for step, (ours, theirs) in enumerate(zip(result["norms"], plain["norms"], strict=True)):
        report.note("norm", abs(ours / theirs - 1), f"step {step}")
    for ours, theirs in zip(result["logprobs"], plain["logprobs"], strict=True):
        report.note("logprob", largest_difference(ours, theirs))
    report.note("gradient", largest_distance(result["gradients"], plain["gradients"]))
    moved = total_distance(plain["end"], plain["start"])
    report.note("update", total_distance(result["end"], plain["end"]) / moved)
    return report


def check_stale_weights_are_waited_for(policy: MegatronPolicy) -> None:
    """Negative: without waiting, a rank reads old values of what other ranks own."""
    assert policy._ddp is not None
    policy.update(micro_batches(policy), toy_loss)
    read = {name: parameter.detach().clone() for name, parameter in policy.model.named_parameters()}
    with policy.device.megatron():
        policy_optimizer.wait_for_parameters(policy._ddp)
    stale = [name for name, parameter in policy.model.named_parameters() if not torch.equal(parameter, read[name])]
    shared = policy._ddp.intra_dp_cp_group.size() > 1
    assert bool(stale) == shared, (stale, shared)


def check_the_tower_must_run_on_every_row(policy: MegatronPolicy) -> None:
    """Negative: a last micro-batch without images would leave the tower's buckets waiting for gradients."""
    encoder = policy.model._encode_images
    if encoder is None:
        return
    assert policy._ddp is not None
    assert len(policy._ddp.buffers[0].buckets) > 3, "too few buckets: the test's claims would be about nothing"
    if policy.layout.pipeline > 1:  # another stage would wait for ever
        return
    assert not len(micro_batches(policy)[-1].image_grid_thw)
    encoder._every_row = False
    with pytest.raises(AssertionError, match="params have grad available"):
        policy.gradients(micro_batches(policy), toy_loss)


def main() -> None:
    directory = Path(sys.argv[1])
    tp, pp, cp = (int(size) for size in sys.argv[2:])
    ddp_config = partial(policy_optimizer.DistributedDataParallelConfig, bucket_size=BUCKET)
    policy_optimizer.DistributedDataParallelConfig = ddp_config
    runs, results = {}, {}
    for mode in (*DATA_PARALLELISM, RECOMPUTE):
        policy = build(directory, (tp, pp, cp), mode)
        runs[mode] = run(policy)
        results[mode] = compare(runs["plain"], runs[mode]).worst
        if mode == RECOMPUTE:
            check_stale_weights_are_waited_for(policy)
            check_the_tower_must_run_on_every_row(policy)
    report_result(results)


if __name__ == "__main__":
    main()
