# SPDX-License-Identifier: Apache-2.0
"""``megatron-g2rpo convert``: weights from a Hugging Face directory to a Megatron checkpoint, and back, at any layout.

Either way a rank holds its shards and one full tensor more. A target appears whole or not at all.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from megatron_g2rpo import weights
from megatron_g2rpo.policy import checkpointing
from megatron_g2rpo.policy.device import select, set_cpu_threads
from megatron_g2rpo.policy.megatron import MegatronPolicy
from megatron_g2rpo.policy.precision import DTYPES
from megatron_g2rpo.recipe import Recipe
from megatron_g2rpo.train.checkpoint import COMPANIONS, write_checkpoint
from megatron_g2rpo.weights import CheckpointError, SafetensorsDirectory


def check_target(target: Path) -> None:
    """Refuse a target that exists.

    Raises:
        FileExistsError: naming it.
    """
    if target.exists():
        raise FileExistsError(f"{target} exists already; choose another place, or remove it first")


def companions(checkpoint: Path, model: Path | None) -> Path:
    """The directory with the config, tokenizer and processor that belong to a Megatron checkpoint.

    Args:
        checkpoint: written by a run or by ``convert import``.
        model: what the user names instead; None for what lies in the checkpoint.

    Raises:
        FileNotFoundError: there is no such checkpoint, or neither place has a config.json.
    """
    if not (checkpoint / "metadata.json").is_file():
        raise FileNotFoundError(f"{checkpoint} is no Megatron checkpoint: it has no metadata.json")
    directory = checkpoint / COMPANIONS if model is None else model
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(
            f"{directory} has no config.json; name the Hugging Face directory that belongs to {checkpoint} with --model"
        )
    return directory


def precision_of_hf(directory: Path) -> str:
    """The one dtype of the weights of a Hugging Face directory, as ``policy.precision`` calls it.

    Raises:
        CheckpointError: there are several, or it is none that the policy has.
    """
    tensors = SafetensorsDirectory(directory)
    return _precision({tensors[name].dtype for name in tensors}, directory)


def precision_of_checkpoint(checkpoint: Path) -> str:
    """The same of a Megatron checkpoint."""
    return _precision(checkpointing.weight_dtypes(checkpoint), checkpoint)


def _precision(dtypes: set[torch.dtype], where: Path) -> str:
    names = {dtype: name for name, dtype in DTYPES.items()}
    if len(dtypes) > 1 or not dtypes <= names.keys():
        found = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise CheckpointError(f"{where}: its weights are {found}; choose one of {', '.join(DTYPES)} with --dtype")
    return names[dtypes.pop()]


def import_hf(recipe: Recipe, target: Path) -> None:
    """Write ``policy.model_name`` as a Megatron checkpoint, which any layout can load. A collective of all ranks.

    Args:
        recipe: its ``policy`` and ``cluster`` sections are read.
        target: a directory that does not exist.

    Raises:
        CheckpointError: the weights do not fit the model's config; all that does not is listed.
    """
    policy = _policy(recipe, "reading")
    with _removed_on_failure(target):
        write_checkpoint(target, policy, policy.sharded_state_dict())


def export(recipe: Recipe, target: Path, *, dtype: str, max_shard_size: str) -> None:
    """Write a Megatron checkpoint as a Hugging Face directory. A collective of all ranks.

    Args:
        recipe: its ``policy`` and ``cluster`` sections are read; ``policy.model_name`` is the companions' directory,
            ``policy.pretrained_checkpoint`` the checkpoint.
        target: a directory that does not exist.
        dtype: of the exported weights.
        max_shard_size: see ``weights.export_hf``.
    """
    policy = _policy(recipe, None)
    wanted = DTYPES[dtype]
    specs = {name: spec.to(wanted) for name, spec in policy.specs().items()}
    stream: Iterable[tuple[str, Tensor]] = ((name, tensor.to(wanted)) for name, tensor in policy.stream())
    with _removed_on_failure(target), _bar("writing", sum(map(_bytes, specs.values()))) as advance:
        weights.export_hf(
            _counted(stream, advance),
            specs,
            target,
            source=recipe.policy.model_name,
            write=dist.get_rank() == 0,
            max_shard_size=max_shard_size,
        )
    dist.barrier()


def _policy(recipe: Recipe, label: str | None) -> MegatronPolicy:
    device = select(recipe.cluster.device)
    if device.kind == "cpu":
        set_cpu_threads(recipe.cluster.gpus_per_node)
    if label is None:
        return MegatronPolicy(recipe.policy, device, seed=0, max_steps=None)
    total = sum(file.stat().st_size for file in Path(recipe.policy.model_name).glob("*.safetensors"))
    with _bar(label, total // recipe.policy.megatron_cfg.model_parallel_size) as advance:
        return MegatronPolicy(recipe.policy, device, seed=0, max_steps=None, on_loaded=advance)


def _counted(tensors: Iterable[tuple[str, Tensor]], advance: checkpointing.Advance) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in tensors:
        yield name, tensor
        advance(_bytes(tensor))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@contextmanager
def _bar(label: str, total: int) -> Iterator[checkpointing.Advance]:
    """A progress bar in bytes, on rank 0."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    first = not dist.is_initialized() or dist.get_rank() == 0
    with Progress(*columns, transient=True, disable=not first) as progress:
        task = progress.add_task(label, total=total)
        yield lambda count: progress.advance(task, count)


@contextmanager
def _removed_on_failure(target: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        if dist.get_rank() == 0:
            shutil.rmtree(target.with_name(target.name + ".partial"), ignore_errors=True)
        raise
