# SPDX-License-Identifier: Apache-2.0
"""Proposes layouts for a number of GPUs: every one that the model divides into is planned, the fastest that fit win.

Recomputation is taken only where a layout does not fit without. Engines are then tried with the layouts whose training
is fastest: vLLM in the training processes, or on servers, which take nodes from the trainer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from megatron_g2rpo.models.cards import Card
from megatron_g2rpo.plan.planner import Plan
from megatron_g2rpo.plan.speed import Speed, estimate
from megatron_g2rpo.recipe import Recipe, TrainRecipe

_MEGATRON = "policy.megatron_cfg."
_GENERATION = "policy.generation."
_REDUCTION = f"{_MEGATRON}distributed_data_parallel_config."
_NODE = 8  # GPUs of a node
_SIZES = (1, 2, 4, 8)
_SHORTEST_SHARE = 4096  # tokens of a row; fewer on a context-parallel rank are not worth their messages
_TRIED_WITH_ENGINES = 8  # layouts of each number of training nodes
_SHARES = (0.3, 0.45, 0.6, 0.75)  # of a GPU, that vLLM takes
_SERVER_SHARE = 0.9
_SWITCHES = tuple(
    f"{_REDUCTION}{key}=true" for key in ("use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather")
)
_NO_ENGINE = f'{_GENERATION}vllm_server_cfg.addresses=["http://none:1"]', f"{_GENERATION}backend=vllm_server"

Again = Callable[[Sequence[str]], Plan]


@dataclass(frozen=True)
class Proposal:
    """A layout with an engine that fits.

    Attributes:
        overrides: the overrides ``key=value`` that make the recipe so.
        plan: its plan.
        speed: its estimated speed.
    """

    overrides: tuple[str, ...]
    plan: Plan
    speed: Speed


class _Tries:
    """Plans what overrides make of the recipe.

    Args:
        card, memory, again: see ``sweep``.

    Attributes:
        planned: whether any could be planned, fitting or not.
        refused: why the first could not that was not.
    """

    def __init__(self, card: Card, memory: float, again: Again) -> None:
        self._card, self._memory, self._again = card, memory, again
        self.planned = False
        self.refused: ValueError | None = None

    def fitting(self, overrides: Sequence[str]) -> list[Proposal]:
        """Return the proposal that overrides make, or nothing where it does not fit or cannot be laid out so."""
        try:
            plan = self._again(overrides)
        except ValueError as error:
            self.refused = self.refused or error
            return []
        self.planned = True
        if not plan.fits(self._memory):
            return []
        return [Proposal(tuple(overrides), plan, estimate(plan, self._card))]


def sweep(recipe: Recipe, gpus: int, card: Card, memory: float, again: Again) -> list[Proposal]:
    """Return the layouts for so many GPUs that fit, best first: the most tokens a second of a GPU.

    Args:
        recipe: the recipe; its layout and engine are what is proposed, all else is kept.
        gpus: number of GPUs of trainer and servers together: up to 8, or whole nodes of 8.
        card: the GPU.
        memory: bytes of one GPU.
        again: function that plans the recipe with further overrides; it raises ValueError where they contradict each
            other, the recipe or the model.

    Raises:
        ValueError: the number of GPUs is no such number; or no layout can be planned at all, fitting or not: what
            ``again`` raised for the first, the plainest of them.
    """
    if gpus > _NODE and gpus % _NODE:
        raise ValueError(f"--gpus {gpus}: take up to {_NODE}, or a multiple of {_NODE} (whole nodes)")
    node = min(gpus, _NODE)
    found: list[Proposal] = []
    tries = _Tries(card, memory, again)
    for servers in _server_nodes(recipe, gpus // node):
        training = gpus // node - servers
        trainers = _trainers(recipe, training, node, tries)
        for trainer in trainers[:_TRIED_WITH_ENGINES]:
            for engine in _engines(recipe, servers * node, training * node):
                found += tries.fitting([*trainer.overrides, *engine])
    if tries.refused is not None and not tries.planned:
        raise tries.refused
    return sorted(found, key=lambda proposal: -proposal.speed.rate)


def _server_nodes(recipe: Recipe, nodes: int) -> list[int]:
    """Return how many nodes servers may take: none, a quarter or half."""
    if not isinstance(recipe, TrainRecipe):
        return [0]
    return sorted({0, *(nodes // part for part in (4, 2))})


def _trainers(recipe: Recipe, nodes: int, node: int, tries: _Tries) -> list[Proposal]:
    """Return the layouts of so many nodes that fit without any engine, the fastest training first."""
    cluster = (f"cluster.num_nodes={nodes}", f"cluster.gpus_per_node={node}")
    none = _NO_ENGINE if isinstance(recipe, TrainRecipe) else ()
    found = []
    for layout in _layouts(recipe, nodes * node, node):
        for recompute in ("null", "full"):
            overrides = [*cluster, *layout, *_SWITCHES, f"{_MEGATRON}recompute_granularity={recompute}"]
            fitting = tries.fitting([*overrides, *none])
            if fitting:
                found.append(Proposal(tuple(overrides), fitting[0].plan, fitting[0].speed))
                break
    return sorted(found, key=lambda proposal: proposal.speed.step - proposal.speed.generation)


def _layouts(recipe: Recipe, world: int, node: int) -> Iterator[tuple[str, ...]]:
    """Iterate over model-parallel layouts: tensor and context parallelism within a node."""
    row = recipe.policy.sequence_packing.train_mb_tokens
    for tensor in _SIZES:
        for context in _SIZES:
            if tensor * context > node or (context > 1 and row // context < _SHORTEST_SHARE):
                continue
            for pipeline in _SIZES:
                if world % (tensor * context * pipeline) == 0:
                    yield (
                        f"{_MEGATRON}tensor_model_parallel_size={tensor}",
                        f"{_MEGATRON}sequence_parallel={'true' if tensor > 1 else 'false'}",
                        f"{_MEGATRON}context_parallel_size={context}",
                        f"{_MEGATRON}pipeline_model_parallel_size={pipeline}",
                    )


def _engines(recipe: Recipe, server_gpus: int, world: int) -> Iterator[tuple[str, ...]]:
    """Iterate over engines: on servers where they have GPUs, else in the training processes."""
    if not isinstance(recipe, TrainRecipe):
        yield ()
        return
    for tensor in _SIZES:
        parallel = f"{_GENERATION}vllm_cfg.tensor_parallel_size={tensor}"
        share = f"{_GENERATION}vllm_cfg.gpu_memory_utilization"
        if server_gpus and server_gpus % tensor == 0:
            addresses = [f"http://server{index}:8000" for index in range(server_gpus // tensor)]
            servers = f"{_GENERATION}vllm_server_cfg.addresses={json.dumps(addresses)}"
            yield (f"{_GENERATION}backend=vllm_server", parallel, f"{share}={_SERVER_SHARE}", servers)
        elif not server_gpus and world % tensor == 0:
            for each in _SHARES:
                yield (f"{_GENERATION}backend=vllm", parallel, f"{share}={each}")
