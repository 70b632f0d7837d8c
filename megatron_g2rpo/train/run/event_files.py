# SPDX-License-Identifier: Apache-2.0
"""TensorBoard's event files: a run that goes on keeps, in one file, what earlier attempts logged up to its first step.

TensorBoard reads the files of a directory in the order of their names, which begin with the second and the host, and
drops of earlier ones what a later one supersedes. Another node's clock, or two attempts within a second, mislead it;
other readers drop nothing. So what a resumed run repeats is taken out, and what is kept has a name that comes first.
"""

from __future__ import annotations

from collections.abc import Iterable
from io import BytesIO
from pathlib import Path
from typing import Any

from megatron_g2rpo.train.run.files import PARTIAL, replace_bytes

# In place of the seconds since 1970.
EARLIER = "events.out.tfevents.0000000000.earlier-attempts"


def keep_steps(directory: Path, last: int) -> None:
    """Keep the scalars of steps up to ``last``; -1: none.

    The files of attempts stay, without scalars: a TensorBoard that is reading one goes on from it to the next. Whatever
    happens meanwhile, a second call gives what the first would have: a scalar in two files is kept once.
    """
    for left in directory.glob(f"*{PARTIAL}"):
        left.unlink()
    files = sorted(directory.glob("events.out.tfevents.*"))
    kept: dict[bytes, Any] = {}
    for path in files:
        kept |= {record: event for record, event in _scalars(path) if event.step <= last}
    if kept:
        start = min(event.wall_time for event in kept.values())
        records = sorted(kept, key=lambda record: kept[record].step)
        replace_bytes(directory / EARLIER, _encoded([_version(start), *records]))
    for path in files:
        if not kept or path.name != EARLIER:
            replace_bytes(path, _encoded([_version(path.stat().st_mtime)]))


def _scalars(path: Path) -> Iterable[tuple[bytes, Any]]:
    """Iterate over encodings and events; one that a killed run did not finish ends the file."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[attr-defined]  # made at import

    for record in RawEventFileLoader(str(path)).Load():
        event = Event.FromString(record)
        if event.HasField("summary"):  # not the marks of restarts: they bid TensorBoard drop what is dropped by now
            yield record, event


def _version(wall_time: float) -> bytes:
    """The event that each file begins with."""
    from tensorboard.compat.proto.event_pb2 import Event  # type: ignore[attr-defined]  # made at import

    return Event(wall_time=wall_time, file_version="brain.Event:2").SerializeToString()


def _encoded(records: Iterable[bytes]) -> bytes:
    from tensorboard.summary.writer.record_writer import RecordWriter

    file = BytesIO()
    writer = RecordWriter(file)
    for record in records:
        writer.write(record)
    return file.getvalue()
