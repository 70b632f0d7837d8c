# SPDX-License-Identifier: Apache-2.0
"""What the trackers' offline files hold: W&B's by its own messages, trackio's by its own reader."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# A `.wandb` file: a header, then LevelDB's log format. Blocks of 32 KiB hold pieces: checksum, length, kind, bytes.
_HEADER, _BLOCK, _PIECE = 7, 32768, struct.Struct("<IHB")
_WHOLE, _LAST = 1, 4


def _messages(data: bytes) -> Iterator[bytes]:
    """Messages of an offline file, each put together from its pieces; what is not finished is left out."""
    at, message = _HEADER, b""
    while at + _PIECE.size <= len(data):
        if _BLOCK - at % _BLOCK < _PIECE.size:  # no header fits into the rest of a block
            at += _BLOCK - at % _BLOCK
            continue
        _, length, kind = _PIECE.unpack_from(data, at)
        at += _PIECE.size
        message += data[at : at + length]
        at += length
        if kind in (_WHOLE, _LAST):
            yield message
            message = b""


def wandb_records(run: Path) -> Iterator[Any]:
    """Records of all offline files of a run directory, the oldest attempt first."""
    from wandb.proto import wandb_internal_pb2

    for path in sorted((run / "wandb").glob("offline-run-*/run-*.wandb"), key=lambda path: path.stat().st_mtime_ns):
        for message in _messages(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(message)
            yield record


def wandb_history(run: Path) -> dict[int, dict[str, Any]]:
    """Step -> its values; no step may be logged twice, but for a table before its numbers."""
    steps: dict[int, dict[str, Any]] = {}
    for record in wandb_records(run):
        if record.WhichOneof("record_type") == "history":
            values = {
                item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
            }
            step = int(values.pop("_step", record.history.step.num))
            assert step not in steps, f"step {step} twice"
            steps[step] = values
    return steps


def wandb_runs(run: Path) -> list[Any]:
    """The records that begin a run, one for each attempt."""
    return [record.run for record in wandb_records(run) if record.WhichOneof("record_type") == "run"]


def wandb_tables(run: Path) -> list[dict[str, Any]]:
    """The tables that were logged, as W&B writes them."""
    return [json.loads(path.read_text()) for path in sorted((run / "wandb").rglob("*.table.json"))]


def trackio_runs(project: str) -> list[Any]:
    """The runs of a project in ``TRACKIO_DIR``: their ``id``, ``name`` and ``config``."""
    import trackio

    return list(trackio.Api().runs(project))


def trackio_history(project: str, run: Any) -> dict[int, dict[str, Any]]:
    """Step -> its values; no step has two values of one name."""
    from trackio.sqlite_storage import SQLiteStorage

    steps: dict[int, dict[str, Any]] = {}
    for line in SQLiteStorage.get_logs(project, run.name, run_id=run.id):
        step = line.pop("step")
        values = {name: value for name, value in line.items() if name != "timestamp"}
        assert not steps.setdefault(step, {}).keys() & values.keys(), f"step {step} twice"
        steps[step] |= values
    return steps
