# SPDX-License-Identifier: Apache-2.0
"""Whether weights can be computed with: every byte of a checkpoint is what was written, every value a finite number."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_g2rpo import progress
from megatron_g2rpo.collectives import gather
from megatron_g2rpo.weights.checkpoint_metadata import structural_faults
from megatron_g2rpo.weights.manifest import MANIFEST, RECIPE_FILE, faults, read_manifest
from megatron_g2rpo.weights.safetensors_directory import CheckpointError

_SHOWN = 5  # in a message


def check_whole(checkpoint: Path) -> None:
    """Check that a Megatron checkpoint's files are what was written. A collective of all ranks, which share the files.

    Without a manifest, as in checkpoints of releases up to 0.4 and of other programs, missing and short files are
    found, and bytes that changed are not. One of a later release's run that has lost its manifest is damaged.

    Raises:
        CheckpointError: they are not; names every file.
    """
    if found := [sentence for share in gather(lambda: faults_of_share(checkpoint)) for sentence in share]:
        raise CheckpointError(
            f"{checkpoint} is damaged; use another checkpoint, or copy it again:\n  " + _listed(found)
        )


def faults_of_share(checkpoint: Path) -> list[str]:
    """Return what of this rank's share of a checkpoint's files is not as it was written, a sentence each.

    Raises:
        CheckpointError: the manifest is damaged.
    """
    manifest = read_manifest(checkpoint)
    if manifest is None:
        return list(_faults_without_manifest(checkpoint)) if dist.get_rank() == 0 else []
    found: list[str] = []
    for path in sorted(manifest.files)[dist.get_rank() :: dist.get_world_size()]:
        found += faults(checkpoint, manifest, [path])
        progress.advance()  # a rank that reads for long does not hang
    return found


def _faults_without_manifest(checkpoint: Path) -> Iterator[str]:
    if (checkpoint / RECIPE_FILE).is_file():
        yield (
            f"{checkpoint / MANIFEST} is missing, which was written with the {RECIPE_FILE} beside it: what the other "
            "files must be is not known"
        )
    yield from structural_faults(checkpoint)


def flaw(tensor: Tensor, dtype: torch.dtype) -> str:
    """Say what a tensor of weights has that cannot be computed with; empty if it has nothing of the kind.

    Args:
        tensor: weights of floating point, of any shape.
        dtype: what they will be converted to.
    """
    if tensor.numel() == 0:
        return ""
    low, high = (float(end) for end in torch.aminmax(tensor))  # one pass, without a copy; NaN is both ends then
    largest = torch.finfo(dtype).max
    if -largest <= low and high <= largest:
        return ""
    if low != low:
        return "holds NaN"
    if float("inf") in (-low, high):
        return "holds Inf"
    return f"holds {max(low, high, key=abs):.4g}, which {dtype} cannot hold"


def refuse_flaws(found: list[str], source: object) -> None:
    """Raise an error that lists what ``flaw`` said of tensors, each with its name and file.

    Raises:
        CheckpointError: ``found`` is not empty.
    """
    if found:
        raise CheckpointError(
            f"{source}: {len(found)} tensors cannot be computed with; use another checkpoint, or copy the files "
            "again:\n  " + _listed(found)
        )


def _listed(lines: list[str]) -> str:
    more = [f"and {len(lines) - _SHOWN} more"] if len(lines) > _SHOWN else []
    return "\n  ".join(lines[:_SHOWN] + more)
