# SPDX-License-Identifier: Apache-2.0
"""Decides whether a plan fits and, if not, which change makes it fit: changes are planned, not guessed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megatron_g2rpo.plan.planner import Plan
from megatron_g2rpo.recipe import Recipe, TrainRecipe

_MEGATRON = "policy.megatron_cfg."
_GENERATION = "policy.generation."
_ROW = "policy.sequence_packing.train_mb_tokens"
_BATCH = "policy.generation.batch_size"
_SHARE = "policy.generation.vllm_cfg.gpu_memory_utilization"


@dataclass(frozen=True)
class Change:
    """A change of a recipe.

    Attributes:
        overrides: the overrides ``key=value`` that make the change.
        plan: the plan of the changed recipe.
    """

    overrides: tuple[str, ...]
    plan: Plan


@dataclass(frozen=True)
class Verdict:
    """Whether a recipe fits, and what to change if it does not.

    Attributes:
        fits: whether the recipe fits as it is.
        change: the first change that fits; None if none does, or if the recipe fits as it is.
        tried: number of changes that were planned.
    """

    fits: bool
    change: Change | None
    tried: int


def judge(plan: Plan, memory: float, again: Callable[[tuple[str, ...]], Plan]) -> Verdict:
    """Decide whether a plan fits; if it does not, try changes until one fits.

    Args:
        plan: the plan of the recipe as it is.
        memory: bytes of one GPU.
        again: function that plans the recipe with further overrides; it raises ValueError where they contradict each
            other or the recipe.
    """
    if plan.fits(memory):
        return Verdict(fits=True, change=None, tried=0)
    tried = 0
    for overrides in changes(plan):
        try:
            other = again(overrides)
        except ValueError:  # a layout that the model or the cluster cannot be split into
            continue
        tried += 1
        if other.fits(memory):
            return Verdict(fits=False, change=Change(overrides, other), tried=tried)
    return Verdict(fits=False, change=None, tried=tried)


def changes(plan: Plan) -> Iterator[tuple[str, ...]]:
    """Iterate over changes, as overrides, cheapest first.

    First come single switches, then smaller batches and rows, then another engine, then all switches together, alone
    and with these, then larger model-parallel layouts, alone, with everything before, and with the last of the engines:
    servers, which take nothing of the trainer's memory.

    Every change of layout is a whole number of model copies over the same processes.
    """
    switches = list(_switches(plan.recipe))
    yield from ((switch,) for switch in switches)
    halves = [tuple(half) for half in _halves(plan.recipe)]
    yield from halves
    engines = list(_engines(plan.recipe))
    yield from engines
    both = [f"{key}" for half in halves for key in half]
    together = tuple(switches)
    if len(switches) > 1:
        yield together
    for count in range(1, len(halves) + 1):
        yield (*together, *_last_of_each([key for half in halves[:count] for key in half]))
    smallest = _last_of_each(both)
    yield from ((*together, *engine) for engine in engines if together)
    for layout in _layouts(plan):
        yield layout
    for layout in _layouts(plan):
        yield _joined(together, layout)
        yield _joined((*together, *smallest), layout)
        if engines:
            yield _joined((*together, *smallest, *engines[-1]), layout)


def _switches(recipe: Recipe) -> Iterator[str]:
    """Iterate over changes that cost little: sharded optimizer state, recomputation, sequence parallelism."""
    options = recipe.policy.megatron_cfg
    if not options.distributed_data_parallel_config.use_distributed_optimizer:
        yield f"{_MEGATRON}distributed_data_parallel_config.use_distributed_optimizer=true"
    if options.recompute_granularity != "full":
        yield f"{_MEGATRON}recompute_granularity=full"
    if options.tensor_model_parallel_size > 1 and not options.sequence_parallel:
        yield f"{_MEGATRON}sequence_parallel=true"


def _halves(recipe: Recipe) -> Iterator[list[str]]:
    """Iterate over smaller decoding batches, down to one sequence, then shorter packed rows, down to one sequence.

    vLLM, which fills what it is given, is given less instead: down to a tenth of a GPU.
    """
    generation = recipe.policy.generation
    size, tenths = generation.batch_size, round(10 * generation.vllm_cfg.gpu_memory_utilization)
    while generation.backend == "vllm" and tenths > 1:
        tenths -= 1
        yield [f"{_SHARE}={tenths / 10}"]
    while generation.backend == "transformers" and size > 1:
        size //= 2
        yield [f"{_BATCH}={size}"]
    row, longest = recipe.policy.sequence_packing.train_mb_tokens, recipe.policy.max_total_sequence_length
    while row > longest:
        row = max(row // 2, longest)
        yield [f"{_ROW}={row}"]


def _engines(recipe: Recipe) -> Iterator[tuple[str, ...]]:
    """Iterate over engines that take less of the trainer's memory: vLLM on more ranks, which sleeps, then servers.

    The address of the servers is to be replaced; a plan only reads that there are some.
    """
    generation = recipe.policy.generation
    if not isinstance(recipe, TrainRecipe) or generation.backend not in {"transformers", "vllm"}:
        return
    embedded, ranks = generation.backend == "transformers", generation.vllm_cfg.tensor_parallel_size
    backend = (f"{_GENERATION}backend=vllm",) if embedded else ()
    if not generation.vllm_cfg.sleep:
        backend = (*backend, f"{_GENERATION}vllm_cfg.sleep=true")
        yield backend
    for size in (1, 2, 4, 8):
        fits_ranks = recipe.cluster.gpus_per_node % size == 0
        if fits_ranks and (size > ranks or (embedded and size == ranks)):
            yield (*backend, f"{_GENERATION}vllm_cfg.tensor_parallel_size={size}")
    yield (f'{_GENERATION}vllm_server_cfg.addresses=["http://SERVER:8000"]', f"{_GENERATION}backend=vllm_server")


def _layouts(plan: Plan) -> Iterator[tuple[str, ...]]:
    """Iterate over larger model-parallel layouts, the smallest first.

    Among layouts of one size, tensor parallelism comes before context and context before pipeline parallelism.
    """
    world, layout = plan.recipe.world_size, plan.layout
    heads = plan.model.config.get_text_config().num_attention_heads
    sizes = [size for size in range(1, world + 1) if world % size == 0]
    found = [
        (tensor * pipeline * context, pipeline, context, tensor)
        for tensor in sizes
        for pipeline in sizes
        for context in sizes
        if tensor >= layout.tensor and pipeline >= layout.pipeline and context >= layout.context
        if heads % tensor == 0 and world % (tensor * pipeline * context) == 0
        if tensor * pipeline * context > layout.model_parallel
    ]
    for _, pipeline, context, tensor in sorted(found):
        changed = {
            "tensor_model_parallel_size": (tensor, layout.tensor),
            "pipeline_model_parallel_size": (pipeline, layout.pipeline),
            "context_parallel_size": (context, layout.context),
        }
        overrides = [f"{_MEGATRON}{key}={new}" for key, (new, old) in changed.items() if new != old]
        if tensor > 1 and not plan.recipe.policy.megatron_cfg.sequence_parallel:
            overrides.append(f"{_MEGATRON}sequence_parallel=true")
        yield tuple(overrides)


def _joined(first: tuple[str, ...], second: tuple[str, ...]) -> tuple[str, ...]:
    return _last_of_each([*first, *second])


def _last_of_each(overrides: list[str]) -> tuple[str, ...]:
    """Keep one override of each key, the last."""
    return tuple({override.split("=")[0]: override for override in overrides}.values())
