# SPDX-License-Identifier: Apache-2.0
"""``megatron-g2rpo convert export``: weights from a Megatron checkpoint to a Hugging Face directory.

The checkpoint's tensors are global, so that there is no model to build, nor a layout to choose: each is read, renamed,
taken apart and written, while the next are being read. Several processes share the files between them; each holds no
more than the largest parameter three times, and converted once where the dtype changes. The directory appears whole or
not at all.
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_g2rpo import models, weights
from megatron_g2rpo.collectives import from_first, gather
from megatron_g2rpo.commands.convert.common import check_target, progress_bar
from megatron_g2rpo.models.directory import load_config
from megatron_g2rpo.policy.device import init_process_group, select
from megatron_g2rpo.types import DTYPES
from megatron_g2rpo.weights.hf_model import published_tensors
from megatron_g2rpo.weights.megatron_checkpoint import MODEL_FILES, MegatronCheckpoint, hf_contents
from megatron_g2rpo.weights.soundness import check_whole, flaw, refuse_flaws
from megatron_g2rpo.weights.table import Entry


def model_files(checkpoint: Path, model: Path | None) -> Path:
    """The directory with the config, tokenizer and processor that belong to a Megatron checkpoint.

    Args:
        checkpoint: written by a run or by ``convert import``.
        model: what the user names instead; None for what lies in the checkpoint.

    Raises:
        FileNotFoundError: neither place has a config.json.
    """
    directory = checkpoint / MODEL_FILES if model is None else model
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(
            f"{directory} has no config.json; name the Hugging Face directory that belongs to {checkpoint} with --model"
        )
    return directory


def export(checkpoint: MegatronCheckpoint, target: Path, *, source: Path, dtype: str, max_shard_size: str) -> None:
    """Write a Megatron checkpoint as a Hugging Face directory. A collective where torchrun started several processes.

    Args:
        checkpoint: what to write.
        target: a directory that does not exist.
        source: Hugging Face directory of config and tokenizer; see ``companions``.
        dtype: dtype of the exported weights.
        max_shard_size: largest file of weights, see ``weights.export_hf``.

    Raises:
        FileExistsError: the target exists.
        CheckpointError: its files are damaged; its weights do not fit the config (all that does not is listed), or
            are not finite.
    """
    hf_config = load_config(source)
    entries, stored = hf_contents(
        checkpoint, models.family(hf_config.model_type).weights(hf_config), published_tensors(hf_config)
    )
    specs = {name: spec.to(DTYPES[dtype]) for name, spec in stored.items()}
    init_process_group(select("cpu"))
    from_first(lambda: check_target(target))  # torchrun may have started this, without a launcher that looked
    check_whole(checkpoint.directory)
    rank, size = dist.get_rank(), dist.get_world_size()
    with ExitStack() as stack:
        partial = weights.partial_path(target)
        if rank == 0:
            stack.enter_context(weights.hf_directory(target, specs, source=source))
        dist.barrier()
        writer = weights.ShardedWriter(partial, specs, max_shard_size=max_shard_size, rank=rank, size=size)
        mine, flaws = writer.expects, list[str]()
        total = sum(specs[name].nbytes for name in mine)
        with writer, progress_bar("writing", total, show=rank == 0) as advance:
            needed = {name: entry for name, entry in entries.items() if not mine.isdisjoint(entry.hf_names)}
            for name, parameter in checkpoint.read_ahead(needed):
                wanted = mine.intersection(needed[name].hf_names)
                flaws += _write(writer, wanted, needed[name], parameter, DTYPES[dtype])
                advance(sum(specs[hf_name].nbytes for hf_name in wanted))
        refuse_flaws([line for of_rank in gather(lambda: flaws) for line in of_rank], checkpoint.directory)
    dist.barrier()


def _write(
    writer: weights.ShardedWriter, wanted: set[str], entry: Entry, parameter: Tensor, dtype: torch.dtype
) -> list[str]:
    """Write some of a parameter's tensors, and say which are not finite; nothing of it outlives its turn."""
    flaws = []
    for hf_name, tensor in zip(entry.hf_names, entry.rule.merge([parameter]), strict=True):
        if hf_name in wanted:
            writer.write(hf_name, tensor.to(dtype))
            if what := flaw(tensor, dtype):
                flaws.append(f"{hf_name} {what}")
    return flaws
