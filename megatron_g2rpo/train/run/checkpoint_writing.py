# SPDX-License-Identifier: Apache-2.0
"""Writes the files of a checkpoint in a thread of this process, while the run goes on or waits.

megatron-core writes them in forked processes. One that is orphaned by a kill waits for ever, half a gigabyte and the
terminal in its hands; when one is killed instead, the rank waits for ever; and a fork under CUDA or gloo's threads is a
risk of its own. A thread ends with its process, and loses no signal. Almost all of the time it is in the operating
system, where it holds no lock of Python's.
"""

from __future__ import annotations

import inspect
import logging
import os
import queue
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

from megatron_g2rpo import progress
from megatron_g2rpo.collectives import all_reduce, together
from megatron_g2rpo.weights.manifest import FileRecord, records

# Without the decorator, which switches the garbage collector of the whole process off: it is meant for a fork.
_write_bucket = FileSystemWriterAsync.write_preloaded_data.__wrapped__  # type: ignore[attr-defined]

# Releases after 0.16 have another writer beside this one, of another package, and take that unless told not to.
_STRATEGY: Any = (
    {"async_strategy": "mcore"}
    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters  # type: ignore[arg-type]
    else {}
)

# megatron-core warns of a directory that is not empty: a new checkpoint's holds a manifest, which says whose it is.
logging.getLogger(serialization.__name__).addFilter(lambda record: "Overwriting old incomplete" not in str(record.msg))


class CheckpointWriteError(OSError):
    """A checkpoint could not be written; earlier ones are as they were."""

    @classmethod
    def of(cls, error: BaseException, directory: Path) -> CheckpointWriteError:
        """Say which rank could not write which checkpoint, and why, as the operating system says it."""
        why = next((cause for cause in _chain(error) if isinstance(cause, OSError)), error)
        text = str(why) or type(why).__name__
        if isinstance(why, OSError) and why.errno:
            text = os.strerror(why.errno) + (f": {why.filename}" if why.filename else "")
        rank = dist.get_rank() if dist.is_initialized() else 0
        return cls(f"rank {rank} could not write {directory}: {text} ({_free(directory)})")


class Writing:
    """The files of one checkpoint, on their way to the disk.

    A collective of all ranks, and so are ``is_done`` and ``finish``. What is written is the state at this moment: it is
    copied first, so that training may go on. Until it is written, the copy takes the state's size in host memory.

    Args:
        state: a sharded state dict, and plain values that are equal on every rank.
        directory: a directory that every rank sees, empty but for a manifest.
        beside: writes further files, in the first rank's thread, and returns their paths within the directory.

    Attributes:
        seconds: time from the beginning until this rank's files were written; 0 before.

    Raises:
        CheckpointWriteError: this rank could not even begin.
    """

    def __init__(
        self, state: dict[str, Any], directory: Path, beside: Callable[[], Iterable[str]] | None = None
    ) -> None:
        self._begun, self.seconds = time.monotonic(), 0.0
        self._directory = directory
        self._beside = beside if dist.get_rank() == 0 else None
        # Where megatron-core expects the outcome. Its own queue is a manager process: it takes seconds to start, and
        # survives a rank that is killed, its terminal held open.
        self._results: queue.Queue[Any] = queue.Queue()
        filesystem_async._results_queue = self._results
        try:
            self._request: Any = dist_checkpointing.save(
                sharded_state_dict=state, checkpoint_dir=str(directory), async_sharded_save=True, **_STRATEGY
            )
        except (OSError, RuntimeError) as error:
            if not _is_of_the_disk(error):
                raise
            raise CheckpointWriteError.of(error, directory) from error
        self._buckets: list[Any] = []
        if self._request.async_fn is not None:  # this rank has something to write
            _, buckets, _ = self._request.async_fn_args
            self._transforms = self._request.async_fn.args[0]
            self._buckets = [_copied(bucket) for bucket in buckets]
        self._outcome: dict[int, Any] | None = {} if self._buckets else None
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._written: Future[dict[str, FileRecord]] = self._executor.submit(self._write)
        self._executor.shutdown(wait=False)

    def _write(self) -> dict[str, FileRecord]:
        """Write this rank's files, read them again and say what each is."""
        names = list(self._beside()) if self._beside is not None else []
        while self._buckets:
            number, bucket = len(self._buckets) - 1, self._buckets.pop()
            outcome: queue.SimpleQueue[Any] = queue.SimpleQueue()
            count: queue.Queue[int] = queue.Queue()
            count.put(number)
            _write_bucket(
                transform_list=self._transforms,
                local_proc_idx=number,
                write_bucket=bucket,
                results_queue=outcome,
                count_queue=count,
                use_fsync=True,
            )
            _, result = outcome.get()
            if isinstance(result, Exception):
                raise result
            assert self._outcome is not None
            self._outcome[number] = result
            names.append(str(bucket[1]))
            progress.advance()  # a rank that writes for long does not hang
            del bucket  # its copies
        found: dict[str, FileRecord] = {}
        for name in names:
            found |= records(self._directory, [name])
            progress.advance()
        self.seconds = time.monotonic() - self._begun
        return found

    def is_done(self) -> bool:
        """Whether every rank has written its files, or failed to."""
        busy = torch.tensor([not self._written.done()], dtype=torch.int32)
        all_reduce(busy, op=dist.ReduceOp.MAX)
        return not bool(busy)

    def finish(self) -> dict[str, FileRecord]:
        """Wait for all ranks, and write the list of tensors.

        Returns:
            Path -> what the file is, of the files that this rank wrote.

        Raises:
            CheckpointWriteError: a rank could not write its files.
        """
        mine = together(self._result)
        if self._outcome is not None:
            self._results.put(dict(sorted(self._outcome.items())))
        try:
            for finalize in self._request.finalize_fns:
                finalize()
        except OSError as error:
            raise CheckpointWriteError.of(error, self._directory) from error
        return mine

    def _result(self) -> dict[str, FileRecord]:
        try:
            return self._written.result()
        except Exception as error:
            raise CheckpointWriteError.of(error, self._directory) from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, and what it came of: torch says of a full disk only that a position is not what it should be."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _is_of_the_disk(error: BaseException) -> bool:
    """Whether the file system refused something; torch's own writer of files says so by its source file alone."""
    return any(isinstance(cause, OSError) for cause in _chain(error)) or "inline_container" in str(error)


def _free(directory: Path) -> str:
    try:
        return f"{shutil.disk_usage(directory).free / 2**20:.0f} MiB are free there"
    except OSError as error:
        return f"the file system cannot be asked: {error.strerror}"


def _copied(bucket: Any) -> Any:
    """A bucket whose tensors are copies on the CPU, which no training step changes."""
    path, key, (values, tensors) = bucket
    return path, key, (values, [(item, tensor.detach().to("cpu", copy=True)) for item, tensor in tensors])
