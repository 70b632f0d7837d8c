# SPDX-License-Identifier: Apache-2.0
"""Three training steps with live updates of the engine, then what the engine answers and thinks, for ``torchrun``.

    agreement_worker.py RECIPE DIRECTORY [key=value ...]

Each rank checks that the engine's log-probabilities are the trainer's within 1e-4 nats, at temperature 1 and 0.7. Rank
0 exports the policy to DIRECTORY/hf and writes to DIRECTORY/greedy.json what the live engine answers greedily.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_g2rpo import recipe as recipes
from megatron_g2rpo import weights
from megatron_g2rpo.commands.compare_rollouts import trainer_logprobs
from megatron_g2rpo.rollout.base import Sampling
from megatron_g2rpo.train.assembly import assemble
from megatron_g2rpo.train.g2rpo import g2rpo_step
from megatron_g2rpo.train.step.generation import answers, generate
from megatron_g2rpo.train.step.minibatches import owned_prompts

STEPS, PROMPTS = 3, 8
# fp32 of another order of sums; a wrong temperature, position or image gives > 0.1.
ATOL = 1e-4


def main() -> None:
    settings = recipes.load(Path(sys.argv[1]), sys.argv[3:], "train")
    directory = Path(sys.argv[2])
    components = assemble(settings)
    engine, policy, groups = components.engine, components.policy, components.policy.groups
    start = {name: tensor.clone() for name, tensor in policy.stream()}
    for step in range(1, STEPS + 1):
        values = g2rpo_step(settings, components, step)
        # The engine has had each step's weights, or this would grow with the steps.
        assert values["train/rollout_gap_max"] < ATOL, f"step {step}: {values['train/rollout_gap_max']}"
    moved = [name for name, tensor in policy.stream() if not torch.equal(tensor, start[name])]
    assert len(moved) > len(start) // 2, "the steps must change the weights, or the comparison is empty"
    engine.load_weights(policy.source())
    owned = owned_prompts(PROMPTS, groups.data_rank, groups.data_size)
    prompts = components.stream.next_batch(PROMPTS, owned)
    budget = settings.policy.sequence_packing.train_mb_tokens
    for temperature in (1.0, 0.7):
        sampling = Sampling(temperature=temperature)
        rollouts = generate(engine, policy, prompts, 4, sampling=sampling, seed=7, group_ids=list(owned))
        own = trainer_logprobs(policy, components.packer, rollouts, budget, temperature)
        for rollout, expected in zip(rollouts, own, strict=True):
            torch.testing.assert_close(rollout.logprobs, expected, rtol=0, atol=ATOL)
    # Validation's prompts, whose images the engine has seen under older weights.
    mine = components.validation
    greedily, group_ids = Sampling(temperature=0.0), list(range(len(mine)))
    for _ in range(2):
        greedy = answers(engine, policy, mine, 1, sampling=greedily, seed=0, group_ids=group_ids)
    found: list[dict[str, list[int]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(found, {r.prompt.key: r.response_ids.tolist() for r in greedy})
    first = dist.get_rank() == 0
    weights.export_hf(
        policy.stream(),
        policy.specs(),
        directory / "hf",
        source=settings.policy.model_name,
        write=first,
    )
    if first:
        everyone = {key: ids for part in found for key, ids in part.items()}
        (directory / "greedy.json").write_text(json.dumps(everyone))
    print(f"engine and trainer agree on rank {dist.get_rank()}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
