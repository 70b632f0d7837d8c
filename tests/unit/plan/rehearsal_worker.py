# SPDX-License-Identifier: Apache-2.0
"""One rank of test_rehearsal.py: a rehearsal of this rank's stage, then the real thing. Usage: DIRECTORY [WORD...]

The rehearsal comes first: it needs a process that has not joined a job. Ranks that no rehearsal stands for (not the
first of their tensor, context and data group) take part in the real run and compare nothing. Words restrict the cases
to those whose name has all of them.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist
from torch import Tensor

from megatron_g2rpo.commands.rehearsal.stage import StageRehearsal, rehearse_stage, rehearsed_settings
from megatron_g2rpo.policy import process_groups
from megatron_g2rpo.policy.device import init_process_group, select
from megatron_g2rpo.policy.layouts.layout import layout_of
from megatron_g2rpo.policy.megatron import MegatronPolicy
from megatron_g2rpo.recipe import Recipe
from megatron_g2rpo.types import PackedBatch
from tests.common.launch import report_result
from tests.common.tiny_model import make_tiny_qwen3vl
from tests.unit.plan.measured import (
    MEGATRON,
    REDUCTION,
    batch_of,
    kept_bytes,
    peak_bytes,
    policy_of,
    saved_bytes,
    state_bytes,
    tiny_recipe,
    toy_loss,
)

BF16, FLOAT32 = "policy.precision=bfloat16", "policy.precision=float32"
FULL = f"{MEGATRON}recompute_granularity=full"
SEQUENCE, DISTRIBUTED = f"{MEGATRON}sequence_parallel=true", f"{REDUCTION}use_distributed_optimizer=true"
TWO = {kind: f"{MEGATRON}{kind}_parallel_size=2" for kind in ("tensor_model", "pipeline_model", "context")}
CASES: dict[int, dict[str, list[str]]] = {
    1: {
        "float32": [FLOAT32],
        "bfloat16": [BF16],
        "bfloat16, full": [BF16, FULL],
        "selective": [FLOAT32, f"{MEGATRON}recompute_granularity=selective"],
    },
    2: {
        "tensor": [FLOAT32, TWO["tensor_model"]],
        "sequence, distributed optimizer": [BF16, TWO["tensor_model"], SEQUENCE, DISTRIBUTED],
        "sequence, full": [BF16, TWO["tensor_model"], SEQUENCE, FULL],
        "pipeline": [FLOAT32, TWO["pipeline_model"]],
        "context": [FLOAT32, TWO["context"]],
        "data, distributed optimizer": [BF16, DISTRIBUTED, f"{REDUCTION}overlap_grad_reduce=true"],
    },
}
# Lengths and shapes of messages, sums of metrics and gradient norms: numbers that a rehearsal has none of.
SMALL = 1_000  # bytes
# Tokens. Several chunks of a row's logits, each of which costs a rehearsal many ops.
CHUNK = "policy.logprob_chunk_size=64"
ROW = ((((8, 8),), ((6, 10), (4, 4)), ()), 150, 60, 3)  # groups of three responses
MICRO_BATCHES = 2


def rehearse(recipe: Recipe, batch: PackedBatch) -> StageRehearsal:
    """This rank's stage."""
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    stage = rank // (world // layout_of(recipe.policy.megatron_cfg).pipeline)
    settings = rehearsed_settings(recipe.policy, recipe.policy.model_name)
    return rehearse_stage(settings, world, stage, batch, MICRO_BATCHES, logprobs=True)


def check(recipe: Recipe, batch: PackedBatch, rehearsal: StageRehearsal) -> dict[str, tuple[Any, Any]] | None:
    """What the rehearsal and the real policy of this rank say of the same: (rehearsed, real)."""
    policy = policy_of(recipe)
    batches = [batch] * MICRO_BATCHES
    with counted_messages() as messages:
        policy.logprobs(batches)
        policy.update(batches, toy_loss)
    activations = kept_of(policy, batch)
    peak = peak_bytes(lambda: policy.gradients(batches, toy_loss)) if dist.get_world_size() == 1 else None
    groups = policy.groups
    if dist.get_rank() != rehearsal.rank or groups.tensor_rank or groups.context_rank or groups.data_rank:
        return None
    rehearsed = Counter()
    for line in rehearsal.traffic:
        for payload, number in line.payloads:
            if payload >= SMALL:
                rehearsed[f"{line.collective} {payload}"] += number
    return {
        "state": (
            [rehearsal.weights, rehearsal.gradients, rehearsal.optimizer],
            list(state_bytes(policy)),
        ),
        "messages": (dict(sorted(rehearsed.items())), dict(sorted(messages.items()))),
        "activations": (rehearsal.activations, activations),
        "peak": (rehearsal.peak, peak),
    }


def kept_of(policy: MegatronPolicy, batch: PackedBatch) -> int:
    """The bytes of one micro-batch: from the allocator in one process, from autograd's saved tensors on two ranks."""
    return kept_bytes(policy, batch) if dist.get_world_size() == 1 else saved_bytes(policy, batch)


@contextmanager
def counted_messages() -> Iterator[Counter[str]]:
    """Count what torch's process groups are asked for inside, ``collective payload`` -> number."""
    found: Counter[str] = Counter()

    def note(collective: str, group: Any, payloads: list[int]) -> None:
        for payload in payloads:
            if group.size() > 1 and payload >= SMALL:
                found[f"{collective} {payload}"] += 1

    def sizes(value: Any) -> list[int]:
        if isinstance(value, Tensor):
            return [value.nbytes]
        return [size for item in value for size in sizes(item)]

    # Method of a process group -> the collective, the argument that holds the whole payload, and whether it is several.
    methods = {
        "allreduce": ("all-reduce", 0, False),
        "allreduce_coalesced": ("all-reduce", 0, True),
        "all_gather_single": ("all-gather", 0, False),
        "allgather": ("all-gather", 0, False),
        "all_gather_single_coalesced": ("all-gather", 0, True),
        "reduce_scatter_single": ("reduce-scatter", 1, False),
        "reduce_scatter_single_coalesced": ("reduce-scatter", 1, True),
        "broadcast": ("broadcast", 0, False),
        "send": ("send", 0, False),
    }

    def watched(real: Callable[..., Any], collective: str, index: int, several: bool) -> Callable[..., Any]:
        def call(group: Any, *arguments: Any, **keywords: Any) -> Any:
            each = sizes(arguments[index])
            note(collective, group, each if several else [sum(each)])
            return real(group, *arguments, **keywords)

        return call

    with ExitStack() as stack:
        for name, (collective, index, several) in methods.items():
            real = getattr(dist.ProcessGroup, name)
            stack.enter_context(patch.object(dist.ProcessGroup, name, watched(real, collective, index, several)))
        yield found


def main() -> None:
    directory, *words = sys.argv[1:]
    world = int(os.environ["WORLD_SIZE"])
    config, _ = make_tiny_qwen3vl(Path(directory) / os.environ["RANK"], layers=4)
    recipes, batches, rehearsals = {}, {}, {}
    for name, overrides in CASES[world].items():
        if all(word in name for word in words):
            model = Path(directory) / os.environ["RANK"]
            recipe = tiny_recipe(model, CHUNK, *overrides, world=world, kind="train")
            recipes[name] = recipe
            batches[name] = batch_of(config, layout_of(recipe.policy.megatron_cfg), *ROW)
            rehearsals[name] = rehearse(recipe, batches[name])
    init_process_group(select("cpu"))
    found = {}
    for name, recipe in recipes.items():
        found[name] = check(recipe, batches[name], rehearsals[name])
        process_groups.reset()
    report_result(found)


if __name__ == "__main__":
    main()
