# SPDX-License-Identifier: Apache-2.0
"""One rank of the checkpoint test: policies of several layouts, one after the other, load each other's checkpoints.

Usage: DIRECTORY (of the model; checkpoints go there too), then CASE for a policy that saves or CASE<CASE for one that
loads what the second saved; a case is tp,pp,cp,mode,precision.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from megatron.core import dist_checkpointing
from torch import Tensor

from megatron_g2rpo.data.packing import Packer
from megatron_g2rpo.policy import optimizer as policy_optimizer
from megatron_g2rpo.policy import process_groups
from megatron_g2rpo.policy.device import init_process_group
from megatron_g2rpo.policy.layouts.layout import token_multiples
from megatron_g2rpo.policy.megatron import MegatronPolicy
from megatron_g2rpo.train.run.checkpoints import Checkpoints
from megatron_g2rpo.types import PackedBatch
from tests.common.compare import total_distance
from tests.common.hardware import this_device
from tests.common.launch import report_result
from tests.common.parity import packer_for, random_sequences, toy_loss
from tests.common.policy_layout import layout_options

# Adam makes a step of about the learning rate out of a gradient near zero as well, whose sign is rounding. In bf16 that
# step is less than the distance of two numbers near 1: a weight moves that far or not at all.
UPDATE_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}

BUCKET = 5000  # elements

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A layout, a mode of data parallelism (see ``tests.common.policy_layout``), and a precision."""

    tp: int
    pp: int
    cp: int
    mode: str
    precision: str

    @classmethod
    def parse(cls, text: str) -> Case:
        tp, pp, cp, mode, precision = text.split(",")
        return cls(int(tp), int(pp), int(cp), mode, precision)

    def __str__(self) -> str:
        return f"{self.tp},{self.pp},{self.cp},{self.mode},{self.precision}"


@dataclass
class Saved:
    """A policy that saved: its weights then, the metrics of two more steps, its weights after them."""

    weights: Weights
    metrics: list[dict[str, float]]
    end: Weights


def build(directory: Path, case: Case) -> MegatronPolicy:
    init_process_group(this_device())
    process_groups.reset()
    options = layout_options(directory, tp=case.tp, pp=case.pp, cp=case.cp, mode=case.mode, precision=case.precision)
    return MegatronPolicy(options, this_device(), seed=0, max_steps=10)


def micro_batches(policy: MegatronPolicy) -> list[PackedBatch]:
    """The same global minibatch at every layout; the last micro-batch has no image, and no row but on one replica."""
    packer: Packer = packer_for(policy.hf_config)
    sequence, row = token_multiples(policy.layout)
    packer = Packer(packer.image_token_id, packer.spatial_merge_size, packer.pad_token_id, sequence, row)
    sequences = random_sequences(policy.hf_config)
    rank, size = policy.groups.data_rank, policy.groups.data_size
    with_images = [item for item in sequences if len(item.inputs.image_grid_thw)]
    without = [item for item in sequences if not len(item.inputs.image_grid_thw)]
    assert with_images
    assert without
    first = packer.pack(with_images[rank::size], budget=96, num_bins=3)
    return [*first, *packer.pack(without if rank == 0 else [], budget=96, num_bins=1)]


def weights_of(policy: MegatronPolicy) -> Weights:
    return {name: tensor.clone() for name, tensor in policy.stream()}


def two_steps(policy: MegatronPolicy) -> list[dict[str, float]]:
    return [policy.update(micro_batches(policy), toy_loss) for _ in range(2)]


def save(directory: Path, case: Case) -> Saved:
    policy = build(directory, case)
    two_steps(policy)
    Checkpoints(directory / str(case), None).save(2, policy, {})
    weights = weights_of(policy)
    return Saved(weights, two_steps(policy), weights_of(policy))


def load(directory: Path, case: Case, source: Case, saved: Saved) -> float:
    """Load, save again, and go on; the distance of the weights at the end, relative to what two steps moved."""
    policy = build(directory, case)
    assert Checkpoints(directory / str(source), None).load(2, policy) == {"step": 2}
    for name, tensor in weights_of(policy).items():
        assert torch.equal(tensor, saved.weights[name]), f"{case} < {source}: {name} changed on the way"
    again = directory / f"{source}-{case}"
    Checkpoints(again, None).save(2, policy, {})
    same_files(directory / str(source), again)
    metrics, end = two_steps(policy), weights_of(policy)
    error = total_distance(end, saved.end) / total_distance(saved.end, saved.weights)
    if case == source:
        assert metrics == saved.metrics, (case, metrics, saved.metrics)
        assert error == 0.0, f"{case}: not bit for bit, {error:.1e} of the update"
    return error


def same_files(one: Path, other: Path) -> None:
    """Two checkpoints hold the same: weights, moments and float32 copies bit for bit, steps and schedule."""
    ours, theirs = (dist_checkpointing.load_plain_tensors(checkpoint_dir=str(path / "step_2")) for path in (one, other))
    assert ours.keys() == theirs.keys()
    assert any(key.startswith("optimizer.state.exp_avg_sq.") for key in ours)
    for key, tensor in ours.items():
        if not isinstance(tensor, Tensor):
            assert tensor == theirs[key], key
            continue
        rows = min(len(tensor), len(theirs[key]))  # tensor parallelism pads the vocabulary
        assert torch.equal(tensor[:rows], theirs[key][:rows]), f"{key} differs between {one.name} and {other.name}"


def main() -> None:
    directory = Path(sys.argv[1])
    # Many buckets with padding between them, as a real model has: with the default of 40 M elements there is one.
    ddp_config = partial(policy_optimizer.DistributedDataParallelConfig, bucket_size=BUCKET)
    policy_optimizer.DistributedDataParallelConfig = ddp_config
    saved: dict[Case, Saved] = {}
    errors: dict[str, float] = {}
    for argument in sys.argv[2:]:
        target, _, source = argument.partition("<")
        if not source:
            saved[Case.parse(target)] = save(directory, Case.parse(target))
        else:
            errors[argument] = load(directory, Case.parse(target), Case.parse(source), saved[Case.parse(source)])
    report_result(errors)


if __name__ == "__main__":
    main()
