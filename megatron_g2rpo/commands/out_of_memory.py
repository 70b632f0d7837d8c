# SPDX-License-Identifier: Apache-2.0
"""A run that is out of memory says in which phase, and which keys of its recipe that phase's memory depends on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_g2rpo import progress
from megatron_g2rpo.policy.device import DeviceError, dump_memory_snapshot
from megatron_g2rpo.recipe import Recipe
from megatron_g2rpo.train.run.directory import RECIPE_FILE
from megatron_g2rpo.train.run.profiling import FOLDER

_MEGATRON = "policy.megatron_cfg."
_LAYOUT = (f"{_MEGATRON}tensor_model_parallel_size", f"{_MEGATRON}pipeline_model_parallel_size")
_ROW = "policy.sequence_packing.train_mb_tokens"
_CHUNK = "policy.logprob_chunk_size"
_SHARDED = f"{_MEGATRON}distributed_data_parallel_config.use_distributed_optimizer"
_RECOMPUTE = f"{_MEGATRON}recompute_granularity"
_BATCH = "policy.generation.batch_size"
_VLLM = "policy.generation.vllm_cfg."
# Phase -> keys that its memory depends on, the cheapest change first. What `plan` counts, in plan/memory.py.
_TRAINING = (_ROW, _CHUNK, _RECOMPUTE, _SHARDED, *_LAYOUT)
_SAMPLING = {
    "transformers": (_BATCH, *_LAYOUT),
    "vllm": (f"{_VLLM}gpu_memory_utilization", *_LAYOUT),
}
KEYS = {
    "update": _TRAINING,
    "task_gradients": _TRAINING,
    "logprobs": (_ROW, _CHUNK, *_LAYOUT),
    "weights": (_SHARDED, *_LAYOUT),
    "checkpoint": (_SHARDED, *_LAYOUT),
}
# On a CPU torch raises what it raises for every error.
_ON_CPU = ("DefaultCPUAllocator: can't allocate memory", "DefaultCPUAllocator: not enough memory")


class OutOfMemory(DeviceError):
    """The memory of a GPU, or of the machine, does not suffice; the message names the keys to change."""


@contextmanager
def explained(recipe: Recipe) -> Iterator[None]:
    """Turn a lack of memory in the body into an error that says what to change.

    Args:
        recipe: the run's recipe.

    Raises:
        OutOfMemory: an allocation of the body failed.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(_message(recipe, error) + _snapshot(recipe)) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that an allocation failed, on a GPU or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return type(error) is RuntimeError and any(text in str(error) for text in _ON_CPU)


def keys_of(recipe: Recipe, phase: str) -> tuple[str, ...]:
    """Return the keys that the memory of a phase depends on, the cheapest change first; layouts where it is unknown."""
    if phase in ("generation", "validation", "engine"):
        return _SAMPLING.get(recipe.policy.generation.backend, _LAYOUT)
    return KEYS.get(phase, _LAYOUT)


def _message(recipe: Recipe, error: BaseException) -> str:
    mark = progress.at()
    tree = recipe.model_dump()
    keys = "\n".join(f"  {key}: {_value(tree, key)}" for key in keys_of(recipe, mark.phase))
    what = str(error).splitlines()[0] if str(error) else type(error).__name__
    return (
        f"out of memory in step {mark.step}, phase {mark.phase}: {what}\n"
        f"what this phase holds depends on, the cheapest change first:\n{keys}\n"
        f"`megatron-g2rpo plan {Path(recipe.logger.log_dir) / RECIPE_FILE} --gpu-memory-gb N` says what takes how "
        "much, and which change makes it fit"
    )


def _snapshot(recipe: Recipe) -> str:
    """Leave what the GPU's memory holds, if the recipe asks for it; a line that says where."""
    options, rank = recipe.logger.profile, os.environ.get("RANK", "0")
    if not (options.enabled and options.memory_history):
        return ""
    path = Path(recipe.logger.log_dir) / FOLDER / f"out_of_memory-rank_{rank}.pickle"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        written = dump_memory_snapshot(path)
    except (OSError, RuntimeError) as error:  # the user must read what ended the run
        return f"\nits memory snapshot could not be written: {error}"
    return f"\nwhat the memory held: {path} (https://docs.pytorch.org/memory_viz)" if written else ""


def _value(tree: dict[str, Any], key: str) -> Any:
    for name in key.split("."):
        tree = tree[name]
    return "null" if tree is None else tree
