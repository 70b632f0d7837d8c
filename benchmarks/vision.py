# SPDX-License-Identifier: Apache-2.0
"""What it costs to encode a group's image: the vision tower's share of a training step, three ways, in one run.

Prompts of 1,024 image tokens (4,096 patches) with eight samples each, two groups a row, one update on two ranks:

- ``copies``: every sample brings its own copy of the image, and both ranks encode all of them;
- ``distinct``: each distinct image of a row once, but on both ranks;
- ``shared``: each distinct image once, on one of the two ranks (what the policy does).

The arms take turns; printed are medians over the turns. Log-probabilities of the three are compared as well.

    python -m torch.distributed.run --standalone --nproc-per-node=2 benchmarks/vision.py [tensor|context]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_g2rpo import recipe as recipes
from megatron_g2rpo.data.packing import Packer, PackSequence
from megatron_g2rpo.policy.device import select
from megatron_g2rpo.policy.layouts.layout import token_multiples
from megatron_g2rpo.policy.megatron import MegatronPolicy
from megatron_g2rpo.train.step.losses import sft_loss
from megatron_g2rpo.types import ModelInputs, PackedBatch

MODEL = "examples/quickstart/policy"
PROMPTS, SAMPLES, SIDE, TEXT, RESPONSE, TURNS = 2, 8, 64, 40, 64, 2


class Stopwatch:
    """Seconds that the vision tower takes, forward and backward."""

    def __init__(self, tower: Any) -> None:
        self.seconds = 0.0
        self._start = 0.0
        tower.register_forward_pre_hook(self._begin)
        tower.register_forward_hook(self._forward_end)

    def _begin(self, *_: Any) -> None:
        self._start = time.perf_counter()

    def _forward_end(self, module: Any, arguments: Any, output: Any) -> None:
        self.seconds += time.perf_counter() - self._start
        # The backward pass of the tower is what runs between the gradient of its output and that of its first weight.
        if output.pooler_output.requires_grad:
            output.pooler_output.register_hook(self._backward_begin)
            self._last = next(module.parameters()).register_post_accumulate_grad_hook(self._backward_end)

    def _backward_begin(self, gradient: Tensor) -> None:
        self._start = time.perf_counter()

    def _backward_end(self, parameter: Tensor) -> None:
        self.seconds += time.perf_counter() - self._start
        self._last.remove()


def sequences(config: Any, *, copies: bool) -> list[PackSequence]:
    """The step's rollouts: random pixels and tokens; with ``copies`` no two samples share their image."""
    generator = torch.Generator().manual_seed(0)
    vision = config.vision_config
    features = SIDE * SIDE // vision.spatial_merge_size**2
    patch_dim = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    result = []
    for _ in range(PROMPTS):
        text = torch.randint(400, (TEXT,), generator=generator)
        frame = [torch.tensor([config.vision_start_token_id]), torch.tensor([config.vision_end_token_id])]
        inputs = ModelInputs(
            token_ids=torch.cat([frame[0], torch.full((features,), config.image_token_id), frame[1], text]),
            pixel_values=torch.randn(SIDE * SIDE, patch_dim, generator=generator),
            image_grid_thw=torch.tensor([[1, SIDE, SIDE]]),
        )
        for _ in range(SAMPLES):
            response = torch.randint(400, (RESPONSE,), generator=generator)
            result.append(PackSequence(inputs=replace(inputs) if copies else inputs, response_ids=response))
    return result


@contextmanager
def every_peer_encodes_all(policy: MegatronPolicy, alone: dist.ProcessGroup) -> Iterator[None]:
    """The vision encoder as if this rank had no peers. For timing only: the gradient counts images twice."""
    encoder: Any = policy.model._encode_images
    group, encoder._group = encoder._group, alone
    try:
        yield
    finally:
        encoder._group = group


def main() -> None:
    """Run the arms in turn and print a line for each."""
    axis = sys.argv[1] if len(sys.argv) > 1 else "tensor"
    budget = 2 * SAMPLES * (SIDE * SIDE // 4 + TEXT + RESPONSE + 16)  # a row holds two groups, so two images
    overrides = [
        f"policy.model_name={MODEL}",
        "policy.precision=float32",
        f"policy.max_total_sequence_length={budget}",
        f"policy.sequence_packing.train_mb_tokens={budget}",
        f"policy.megatron_cfg.{axis}_{'model_parallel' if axis == 'tensor' else 'parallel'}_size={2}",
        "cluster.gpus_per_node=2",
        "env.tasks={any: {}}",
    ]
    recipe = recipes.load(recipes.EXEMPLARS / "vlm_sft.yaml", ["env.tasks={any: {}}", *overrides], "sft")
    policy = MegatronPolicy(recipe.policy, select("cpu"), seed=0, max_steps=1000)
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    assert isinstance(alone, dist.ProcessGroup)
    multiples = token_multiples(policy.layout)
    config = policy.hf_config
    packer = Packer(config.image_token_id, config.vision_config.spatial_merge_size, 0, *multiples)
    rows = {copies: packer.pack(sequences(config, copies=copies), budget) for copies in (False, True)}
    assert len(rows[False]) == PROMPTS // 2
    watch = Stopwatch(policy.model.vision_model)
    steps: dict[str, list[float]] = {"copies": [], "distinct": [], "shared": []}
    towers: dict[str, list[float]] = {name: [] for name in steps}
    logprobs: dict[str, Tensor] = {}

    def run(name: str, batches: list[PackedBatch]) -> None:
        logprobs.setdefault(name, torch.cat([stats.logprobs for stats in policy.logprobs(batches)]))
        watch.seconds = 0.0
        dist.barrier()
        start = time.perf_counter()
        policy.gradients(batches, sft_loss)
        dist.barrier()
        steps[name].append(time.perf_counter() - start)
        spent = torch.tensor(watch.seconds)
        dist.all_reduce(spent, op=dist.ReduceOp.MAX)
        towers[name].append(float(spent))

    for _ in range(TURNS):
        with every_peer_encodes_all(policy, alone):
            run("copies", rows[True])
            run("distinct", rows[False])
        run("shared", rows[False])
    if dist.get_rank() == 0:
        for name, seconds in steps.items():
            tower, step = median(towers[name]), median(seconds)
            gap = float((logprobs[name] - logprobs["shared"]).abs().max())
            print(
                f"{axis} x 2  {name:9} step {step:7.2f} s  tower {tower:7.2f} s = {tower / step:.0%} of it  "
                f"log-probabilities within {gap:.0e} of `shared`",
                flush=True,
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
