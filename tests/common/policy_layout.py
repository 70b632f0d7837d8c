# SPDX-License-Identifier: Apache-2.0
"""The ``policy`` section of a test's policy, from the exemplar recipe: a key that is renamed fails here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_g2rpo import recipe as recipes
from megatron_g2rpo.recipe import Policy
from tests.common.hardware import layer_overrides
from tests.common.recipes import G2RPO

# Beside the exemplar's defaults: numbers that can be compared closely, steps and a decay that are larger than rounding,
# and chunks that are smaller than a row.
TINY = {
    "precision": "float32",
    "logprob_chunk_size": 7,
    "megatron_cfg.optimizer.lr": 1e-3,
    "megatron_cfg.optimizer.weight_decay": 0.1,
}
# As many processes as one replica of the model needs: the recipe refuses others.
_SIZE = "${{policy.megatron_cfg.{}_parallel_size}}"
_TENSOR, _PIPELINE, _CONTEXT = (_SIZE.format(name) for name in ("tensor_model", "pipeline_model", "context"))
PROCESSES = f"cluster.gpus_per_node=${{mul:{_TENSOR},${{mul:{_PIPELINE},{_CONTEXT}}}}}"

# The keys of distributed_data_parallel_config that each mode of data parallelism turns on.
DATA_PARALLELISM: dict[str, tuple[str, ...]] = {
    "plain": (),
    "overlap": ("overlap_grad_reduce",),
    "distributed": ("use_distributed_optimizer",),
    "distributed-overlap": ("use_distributed_optimizer", "overlap_grad_reduce"),
    "distributed-overlap-gather": ("use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather"),
}


def policy_section(directory: Path | str, *overrides: str) -> Policy:
    """Return the exemplar's ``policy`` section for a tiny model.

    Args:
        directory: directory of the model.
        overrides: ``key=value`` each, as on the command line, but for the leading ``policy.``.

    Raises:
        RecipeError: a key is unknown, or a value is refused.
    """
    layers = {f"megatron_cfg.{key}": value for key, value in layer_overrides().items()}
    own = [f"{key}={json.dumps(value)}" for key, value in {"model_name": str(directory), **TINY, **layers}.items()]
    keys = [f"policy.{override}" for override in (*own, *overrides)]
    return recipes.load(G2RPO, [PROCESSES, *keys], "train").policy


def layout_options(
    directory: Path | str,
    *overrides: str,
    tp: int = 1,
    pp: int = 1,
    cp: int = 1,
    mode: str = "plain",
    precision: str = "float32",
    lr: float = 1e-3,
    **megatron: Any,
) -> Policy:
    """Return ``policy_section`` for a parallel layout.

    Args:
        directory: directory of the model.
        overrides: as ``policy_section`` takes them; they come last.
        tp, pp, cp: tensor-, pipeline- and context-parallel size.
        mode: mode of data parallelism, a key of ``DATA_PARALLELISM``.
        precision: data type of the weights.
        lr: peak learning rate.
        megatron: further keys of ``megatron_cfg``.
    """
    keys = {
        "precision": precision,
        "megatron_cfg.optimizer.lr": lr,
        "megatron_cfg.tensor_model_parallel_size": tp,
        "megatron_cfg.pipeline_model_parallel_size": pp,
        "megatron_cfg.context_parallel_size": cp,
        **{f"megatron_cfg.distributed_data_parallel_config.{key}": True for key in DATA_PARALLELISM[mode]},
        **{f"megatron_cfg.{key}": value for key, value in {**layer_overrides("auto", precision), **megatron}.items()},
    }
    return policy_section(directory, *(f"{key}={json.dumps(value)}" for key, value in keys.items()), *overrides)
