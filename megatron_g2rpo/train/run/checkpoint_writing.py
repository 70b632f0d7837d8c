# SPDX-License-Identifier: Apache-2.0
"""Writes the files of a checkpoint in a thread of this process, while the run goes on or waits.

megatron-core writes them in forked processes. One that is orphaned by a kill waits for ever, half a gigabyte and the
terminal in its hands; when one is killed instead, the rank waits for ever; and a fork under CUDA or gloo's threads is a
risk of its own. A thread ends with its process, and loses no signal. Almost all of the time it is in the operating
system, where it holds no lock of Python's.
"""

from __future__ import annotations

import os
import queue
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from megatron_g2rpo.collectives import together
from megatron_g2rpo.weights.manifest import FileRecord, records

# Where the thread leaves its results. megatron-core's own is a manager process: it takes seconds to start, and survives
# a rank that is killed, its terminal held open.
filesystem_async._results_queue = queue.Queue()
# Without the decorator, which switches the garbage collector of the whole process off: it is meant for a fork.
_write_bucket = FileSystemWriterAsync.write_preloaded_data.__wrapped__  # type: ignore[attr-defined]


class CheckpointWriteError(OSError):
    """A checkpoint could not be written; earlier ones are as they were."""


class Writing:
    """The files of one checkpoint, on their way to the disk.

    A collective of all ranks, and so are ``is_done`` and ``finish``. What is written is the state at this moment: it is
    copied first, so that training may go on.

    Args:
        state: a sharded state dict, and plain values that are equal on every rank.
        directory: an empty directory that every rank sees.
    """

    def __init__(self, state: dict[str, Any], directory: Path) -> None:
        self._directory = directory
        self._request: Any = dist_checkpointing.save(
            sharded_state_dict=state, checkpoint_dir=str(directory), async_sharded_save=True
        )
        self._buckets: list[Any] = []
        if self._request.async_fn is not None:  # this rank has something to write
            _, buckets, self._results = self._request.async_fn_args
            self._transforms = self._request.async_fn.args[0]
            self._buckets = [_copied(bucket) for bucket in buckets]
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._written: Future[dict[str, FileRecord]] = self._executor.submit(self._write)
        self._executor.shutdown(wait=False)

    def _write(self) -> dict[str, FileRecord]:
        """Write this rank's files, read them again and say what each is."""
        found: dict[int, Any] = {}
        for number, bucket in enumerate(self._buckets):
            outcome: queue.SimpleQueue[Any] = queue.SimpleQueue()
            count: queue.Queue[int] = queue.Queue()
            count.put(number)
            _write_bucket(self._transforms, number, bucket, outcome, count, use_fsync=True)
            _, result = outcome.get()
            if isinstance(result, Exception):
                raise result
            found[number] = result
        names = [str(name) for _, name, _ in self._buckets]
        self._buckets = []  # the copies
        if names:
            self._results.put(found)
        return records(self._directory, names)

    def is_done(self) -> bool:
        """Whether every rank has written its files, or failed to."""
        busy = torch.tensor([not self._written.done()], dtype=torch.int32)
        dist.all_reduce(busy, op=dist.ReduceOp.MAX)
        return not bool(busy)

    def finish(self) -> dict[str, FileRecord]:
        """Wait for all ranks, and write the list of tensors.

        Returns:
            Path -> what the file is, of the files that this rank wrote.

        Raises:
            CheckpointWriteError: a rank could not write its files.
        """
        mine = together(self._outcome)
        for finalize in self._request.finalize_fns:
            finalize()
        return mine

    def _outcome(self) -> dict[str, FileRecord]:
        try:
            return self._written.result()
        except Exception as error:
            why = next((cause for cause in _chain(error) if isinstance(cause, OSError)), error)
            text = os.strerror(why.errno) if isinstance(why, OSError) and why.errno else str(why)
            raise CheckpointWriteError(f"rank {dist.get_rank()} could not write {self._directory}: {text}") from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and what it came of: torch says of a full disk only that a position is not what it should be."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _copied(bucket: Any) -> Any:
    """A bucket whose tensors are copies on the CPU, which no training step changes."""
    path, key, (values, tensors) = bucket
    return path, key, (values, [(item, tensor.detach().to("cpu", copy=True)) for item, tensor in tensors])
