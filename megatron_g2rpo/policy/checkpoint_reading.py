# SPDX-License-Identifier: Apache-2.0
"""Loads checkpoints with megatron-core's ``dist_checkpointing``, without running what a file of theirs may say."""

from __future__ import annotations

import os
import pickle
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_g2rpo.policy import fp8_state
from megatron_g2rpo.policy.layer_spec import CHECKPOINT_NAMES
from megatron_g2rpo.weights import CheckpointError
from megatron_g2rpo.weights.checkpoint_metadata import read_metadata, reason

_READER = "PytorchStreamReader"  # what torch's errors about an archive that it cannot read say
_DATA_ALONE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def load(template: dict[str, Any], directory: str | Path) -> Any:
    """Return what a checkpoint holds of a sharded state dict. A collective of all ranks.

    Args:
        template: the sharded state dict to fill; its entries get the names that the checkpoint has for them.
        directory: directory of the checkpoint.

    Raises:
        CheckpointError: see ``read_metadata``; or a file is damaged, or names something to run.
        CheckpointingException: megatron-core's, of a checkpoint that does not fit the template.
    """
    # Refuses what megatron-core's own reading would run.
    stored = read_metadata(Path(directory)).state_dict_metadata
    _use_stored_names(template, stored.keys())
    if "fp8" in template:
        fp8_state.keep_stored(template["fp8"], _sizes(stored), directory)
    try:
        with _data_alone():
            return dist_checkpointing.load(sharded_state_dict=template, checkpoint_dir=str(directory))
    except CheckpointException as error:  # a BaseException: no handler of errors would see it
        why = "; ".join(f"rank {rank}: {reason(cause)}" for rank, (cause, _) in sorted(error.failures.items()))
        raise CheckpointError(f"{directory} cannot be read: {why}") from error
    except (EOFError, pickle.UnpicklingError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and _READER not in str(error):
            raise  # of the device or of the network
        raise CheckpointError(
            f"{directory}: a file of it is damaged ({reason(error)}); use another checkpoint"
        ) from error


def _sizes(stored: Mapping[str, Any]) -> dict[str, torch.Size]:
    return {name: entry.size for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}


def _use_stored_names(template: dict[str, Any], stored: Collection[str]) -> None:
    """Ask for norms, and for their optimizer state, under the names of this checkpoint.

    Checkpoints call the norms before a layer's linears as Transformer Engine's modules do. Up to version 0.3.0, and in
    other programs, they have the names of the local modules.
    """
    names = [(ours, theirs) for local, engine in CHECKPOINT_NAMES.items() for ours, theirs in _both_ways(local, engine)]
    for entry in nested_values(x=template):
        if not isinstance(entry, ShardedTensor | ShardedTensorFactory) or entry.key in stored:
            continue
        others = (entry.key.replace(ours, theirs) for ours, theirs in names)
        entry.key = next((other for other in others if other in stored), entry.key)


def _both_ways(one: str, other: str) -> tuple[tuple[str, str], tuple[str, str]]:
    # Whole parts of a name only: a norm that another module contains may be called nearly the same.
    one, other = f".{one}", f".{other}"
    return (one, other), (other, one)


@contextmanager
def _data_alone() -> Iterator[None]:
    """Have ``torch.load`` read data and nothing to run, also where its caller asks for more.

    ``DefaultLoadPlanner.load_bytes`` of torch does, for entries that are not tensors.
    """
    before = os.environ.get(_DATA_ALONE)
    os.environ[_DATA_ALONE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_DATA_ALONE]
        else:
            os.environ[_DATA_ALONE] = before
