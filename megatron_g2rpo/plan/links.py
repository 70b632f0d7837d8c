# SPDX-License-Identifier: Apache-2.0
"""Time that a rank's messages take, from the bytes that ``plan.wire`` counts and the links that they cross.

Ranks are numbered tensor first, then context, data and pipeline parallel, so that the first of these lie in one node.
"""

from __future__ import annotations

from collections.abc import Iterable

from megatron_g2rpo.models.cards import NETWORK, Card
from megatron_g2rpo.plan.wire import KEYS_AND_VALUES, Traffic
from megatron_g2rpo.policy.layouts.layout import Layout
from megatron_g2rpo.recipe import Recipe

REACHED = 0.7  # share of a link's bandwidth that large messages reach
HIDDEN = 0.8  # share of the messages that the recipe overlaps with arithmetic


def seconds(recipe: Recipe, layout: Layout, lines: Iterable[Traffic], card: Card) -> float:
    """Return the time that messages of one rank add to its arithmetic, seconds."""
    return sum(
        line.sent / bandwidth(recipe, layout, line.group, card) * (1 - HIDDEN if _overlaps(recipe, line) else 1.0)
        for line in lines
    )


def bandwidth(recipe: Recipe, layout: Layout, group: str, card: Card) -> float:
    """Return the bytes a second that a rank sends in a group's ring.

    A ring that crosses nodes leaves each of them once; NCCL lays as many rings as the group has ranks (and adapters) in
    a node.

    Args:
        recipe: the recipe, of which the nodes are read.
        layout: the parallel sizes.
        group: the group as ``Traffic`` names it.
        card: the GPU.
    """
    node, world = recipe.cluster.gpus_per_node, recipe.world_size
    kind = group.split(" (")[0]
    apart, reach = {  # distance of neighbours in the numbering, and of the first from behind the last
        "tensor": (1, layout.tensor),
        "context": (layout.tensor, layout.tensor * layout.context),
        "tensor x context": (1, layout.tensor * layout.context),
        "data x context": (layout.tensor, world // layout.pipeline),
        "pipeline": (world // layout.pipeline, world),
        "first and last stage": (world // layout.pipeline, world),
    }[kind]
    if reach <= node:
        return REACHED * card.nvlink
    return REACHED * min(card.nvlink, NETWORK * max(node // apart, 1))


def _overlaps(recipe: Recipe, line: Traffic) -> bool:
    options = recipe.policy.megatron_cfg
    reduction = options.distributed_data_parallel_config
    if line.what == "updated weights":
        return reduction.overlap_param_gather
    if line.what == "gradients":
        return reduction.overlap_grad_reduce
    # Transformer Engine's ring sends the next keys and values while it computes with these.
    return line.what == KEYS_AND_VALUES and options.cp_comm_type == "p2p"
