# SPDX-License-Identifier: Apache-2.0
"""Writing a Hugging Face model directory from a weight stream."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from megatron_g2rpo.weights.checkpoint import INDEX_NAME

# What travels beside the weights: configuration, tokenizer, processors, chat template, licence.
_COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "README.md")


def export_hf(
    tensors: Iterable[tuple[str, Tensor]],
    directory: str | Path,
    *,
    source: str | Path,
    write: bool,
    max_shard_bytes: int = 5 * 1024**3,
) -> None:
    """Write a directory that ``from_pretrained`` loads.

    A collective like the stream it reads: every rank calls it, and ranks with ``write=False`` only drain the stream.
    The directory appears whole or not at all: it is written beside its place and renamed. Its config.json names the
    dtype of the weights, which ``from_pretrained`` would otherwise round to the source's.

    Args:
        tensors: ``(hf_name, full_tensor)``.
        directory: where to; replaced if it exists.
        source: the model directory that training started from; its other files are copied.
        write: whether this rank writes.
        max_shard_bytes: size of one safetensors file.
    """
    directory, source = Path(directory), Path(source)
    partial = directory.with_name(directory.name + ".partial")
    if write:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    total = pending_bytes = 0
    dtype = ""
    for name, tensor in tensors:
        if not write:
            continue
        dtype = str(tensor.dtype).removeprefix("torch.")
        size = tensor.numel() * tensor.element_size()
        if pending and pending_bytes + size > max_shard_bytes:
            _flush(partial, shards, pending)
            pending, pending_bytes = {}, 0
        pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        pending_bytes += size
        total += size
    if not write:
        return
    _flush(partial, shards, pending)
    _name_shards(partial, shards, total)
    for pattern in _COPIED:
        for file in source.glob(pattern):
            if file.name != INDEX_NAME:
                shutil.copy2(file, partial / file.name)
    _name_dtype(partial / "config.json", dtype)
    old = directory.with_name(directory.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if directory.exists():
        directory.rename(old)
    partial.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


def _name_dtype(config: Path, dtype: str) -> None:
    """Set the dtype that the configuration and its sections state, where they state one."""
    tree = json.loads(config.read_text())
    sections = [tree, *(value for value in tree.values() if isinstance(value, dict))]
    stated = [(section, key) for section in sections for key in ("dtype", "torch_dtype") if key in section]
    if any(section[key] != dtype for section, key in stated):
        for section, key in stated:
            section[key] = dtype
        config.write_text(json.dumps(tree, indent=2) + "\n")


def _flush(partial: Path, shards: list[list[str]], pending: dict[str, Tensor]) -> None:
    shards.append(list(pending))
    file = partial / f"{len(shards)}.part"
    file.touch()
    mode = file.stat().st_mode  # the user's umask; safetensors would leave the file readable to its owner alone
    save_file(pending, file, metadata={"format": "pt"})
    file.chmod(mode)


def _name_shards(partial: Path, shards: list[list[str]], total_bytes: int) -> None:
    """Give the files their final names, which hold the number of shards, and write the index."""
    if len(shards) == 1:
        (partial / "1.part").rename(partial / "model.safetensors")
        return
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        (partial / f"{number}.part").rename(partial / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (partial / INDEX_NAME).write_text(json.dumps(index, indent=2))
