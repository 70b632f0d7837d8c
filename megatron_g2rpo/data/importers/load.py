# SPDX-License-Identifier: Apache-2.0
"""Reading of image files, by several processes if asked: in order, and no more of them in memory than are in work."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path

from megatron_g2rpo.data.errors import DataError, SampleError
from megatron_g2rpo.data.images import read_image, suffix_of
from megatron_g2rpo.data.importers.base import Refusal, Rejected
from megatron_g2rpo.data.importers.split import digest
from megatron_g2rpo.processes import forkserver

_CHUNK = 16  # samples that go to a process at once
_AHEAD = 4  # chunks a process that are in work or wait to be written


@dataclass(frozen=True, kw_only=True)
class Waiting:
    """A sample whose fields are checked and whose images are still to be read."""

    name: str
    fields: dict[str, object]
    images: tuple[bytes | Path, ...]


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A sample with its encoded images, the suffix of each, and what it shows as hex digests (where asked for)."""

    name: str
    fields: dict[str, object]
    images: tuple[bytes, ...]
    suffixes: tuple[str, ...]
    contents: tuple[str, ...]


def load_all(
    samples: Iterator[Waiting | Rejected], *, workers: int, decode: bool, digests: bool
) -> Iterator[Loaded | Rejected]:
    """Read the images of samples; what is yielded does not depend on ``workers``.

    Args:
        samples: samples, and rows that were rejected already, which are passed on.
        workers: number of processes that read; 1 reads in this one.
        decode: whether every image is decoded, so that a damaged one is rejected.
        digests: whether ``Loaded.contents`` is filled in.

    Raises:
        DataError: one of the processes was killed.
    """
    work = partial(_load_chunk, decode=decode, digests=digests)
    if workers == 1:
        while chunk := list(islice(samples, _CHUNK)):
            yield from _joined(chunk, work(chunk))
        return
    # Not forked: a fork copies the locks of the threads that Arrow has started.
    pool = ProcessPoolExecutor(workers, mp_context=forkserver(), initializer=_ignore_interrupts)
    try:
        running: deque[tuple[list[Waiting | Rejected], Future[list[Loaded | Rejected]]]] = deque()
        while True:
            while len(running) < _AHEAD * workers and (chunk := list(islice(samples, _CHUNK))):
                running.append((chunk, pool.submit(work, chunk)))
            if not running:
                return
            chunk, future = running.popleft()
            yield from _joined(chunk, future.result())
    except BrokenProcessPool as error:
        raise DataError("a process that reads images was killed, perhaps for memory; take fewer --workers") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _load_chunk(chunk: list[Waiting | Rejected], *, decode: bool, digests: bool) -> list[Loaded | Rejected]:
    return [item if isinstance(item, Rejected) else _load(item, decode, digests) for item in chunk]


def _load(sample: Waiting, decode: bool, digests: bool) -> Loaded | Rejected:
    """Read one sample; images that it has already are left empty in the result, and need not travel back."""
    images, suffixes, contents = [], [], []
    try:
        for position, image in enumerate(sample.images):
            name = f"{sample.name}: image {position if isinstance(image, bytes) else image}"
            data = image if isinstance(image, bytes) else _file(image, sample.name)
            suffixes.append(suffix_of(data, name))
            if decode:
                read_image(data, name)
            if digests:
                contents.append(digest(data))
            images.append(b"" if isinstance(image, bytes) else data)
    except SampleError as error:
        return Rejected.by(error, sample.name, "an image cannot be decoded, or is of a format that is not read")
    if digests and not contents:
        contents.append(digest(str(sample.fields["question"]).encode()))
    return Loaded(
        name=sample.name,
        fields=sample.fields,
        images=tuple(images),
        suffixes=tuple(suffixes),
        contents=tuple(contents),
    )


def _joined(chunk: list[Waiting | Rejected], read: list[Loaded | Rejected]) -> Iterator[Loaded | Rejected]:
    for sample, found in zip(chunk, read, strict=True):
        if isinstance(found, Loaded) and isinstance(sample, Waiting):
            pairs = zip(sample.images, found.images, strict=True)
            found = replace(found, images=tuple(own if isinstance(own, bytes) else data for own, data in pairs))
        yield found


def _file(path: Path, name: str) -> bytes:
    try:
        if path.exists() and not path.is_file():
            raise Refusal(name, "an image file cannot be read", f"{path} is no file")  # a device may never end
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise Refusal(name, "an image file cannot be read", f"{path} ({getattr(error, 'strerror', error)})") from error


def _ignore_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes; the first one ends the others
