# SPDX-License-Identifier: Apache-2.0
"""Loads checkpoints with megatron-core's ``dist_checkpointing``, without running what a file of theirs may say."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from torch.distributed.checkpoint.api import CheckpointException

from megatron_g2rpo.weights import CheckpointError
from megatron_g2rpo.weights.checkpoint_metadata import read_metadata

_DATA_ALONE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def load(template: dict[str, Any], directory: str | Path) -> Any:
    """Return what a checkpoint holds of a sharded state dict. A collective of all ranks.

    Args:
        template: the sharded state dict to fill.
        directory: directory of the checkpoint.

    Raises:
        CheckpointError: see ``read_metadata``; or a file is damaged, or names something to run.
        CheckpointingException: megatron-core's, of a checkpoint that does not fit the template.
    """
    read_metadata(Path(directory))  # refuses what megatron-core's own reading would run
    try:
        with _data_alone():
            return dist_checkpointing.load(sharded_state_dict=template, checkpoint_dir=str(directory))
    except CheckpointException as error:  # a BaseException: no handler of errors would see it
        why = "; ".join(f"rank {rank}: {cause!r}" for rank, (cause, _) in sorted(error.failures.items()))
        raise CheckpointError(f"{directory} cannot be read: {why}") from error
    except (EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{directory}: a file of it is damaged ({error!r}); use another checkpoint") from error


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
