# SPDX-License-Identifier: Apache-2.0
"""Reads the rollouts of a run: which steps there are, one of them, or some columns of all."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_g2rpo.records.schema import DIRECTORY, Header, RecordError

_NAME = re.compile(r"step_([0-9]{6,})\.parquet")


def file_of(run: Path, step: int) -> Path:
    """Return the path of a step's file, whether it is there or not."""
    return run / DIRECTORY / f"step_{step:06d}.parquet"


def files_in(run: Path) -> dict[int, Path]:
    """Return step -> file of every step that a run has recorded, in the order of steps."""
    found = ((_NAME.fullmatch(path.name), path) for path in (run / DIRECTORY).glob("step_*.parquet"))
    return dict(sorted((int(match[1]), path) for match, path in found if match))


def read_header(path: Path) -> Header:
    """Return what a file says of itself, without reading its rows.

    Raises:
        RecordError: it is no record, or damaged.
        OSError: it cannot be read.
    """
    try:
        return Header.of(pq.read_schema(path), str(path))
    except pa.ArrowInvalid as error:
        raise _damaged(path, error) from error


def read_step(run: Path, step: int) -> tuple[pa.Table, Header]:
    """Return the rollouts of a step, in the order of group and sample, and what their file says of itself.

    Raises:
        RecordError: the step is not recorded, and the message says which are; or its file is damaged.
    """
    path = file_of(run, step)
    if not path.exists():
        raise RecordError(f"{run} has no record of step {step}; {steps_text(list(files_in(run)))}")
    try:
        table = pq.read_table(path)
    except pa.ArrowInvalid as error:
        raise _damaged(path, error) from error
    return table, Header.of(table.schema, str(path))


def read_steps(
    run: Path,
    names: Sequence[str] | None = None,
    steps: Collection[int] | None = None,
    *,
    with_unfinished: bool = False,
) -> pa.Table:
    """Return the rollouts of several steps as one table; a part that a step does not have is null there.

    A file that is damaged is an error; one that vanishes meanwhile (the run goes on) is left out.

    Args:
        run: the run directory.
        names: columns to read; None for all. One that no file has is left out.
        steps: steps to read; None for all that are recorded.
        with_unfinished: whether to read steps, too, that failed or are under way, see ``Header.is_finished``.

    Raises:
        RecordError: a file is damaged, or there is none.
    """
    tables = []
    for step, path in files_in(run).items():
        if steps is not None and step not in steps:
            continue
        try:
            schema = pq.read_schema(path)
            if not (Header.of(schema, str(path)).is_finished or with_unfinished):
                continue
            wanted = None if names is None else [name for name in names if name in schema.names]
            tables.append(pq.read_table(path, columns=wanted).replace_schema_metadata())
        except FileNotFoundError:
            continue
        except pa.ArrowInvalid as error:
            raise _damaged(path, error) from error
    if not tables:
        raise RecordError(f"{run} has no record of the steps asked for; {steps_text(list(files_in(run)))}")
    return pa.concat_tables(tables, promote_options="default")


def steps_text(steps: Sequence[int]) -> str:
    """Say which steps are recorded, ranges as ``3-7``; the end of a sentence."""
    if not steps:
        return "none is recorded (logger.rollouts.enabled)"
    return f"recorded are {ranges(steps)}"


def ranges(steps: Sequence[int]) -> str:
    """Return ascending numbers as text, neighbours as ranges: ``1-3, 7, 9-10``."""
    found: list[list[int]] = []
    for step in steps:
        if found and step == found[-1][1] + 1:
            found[-1][1] = step
        else:
            found.append([step, step])
    return ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in found)


def _damaged(path: Path, error: Exception) -> RecordError:
    return RecordError(f"{path} is damaged ({str(error).splitlines()[0]}): remove it, it is a record and nothing more")
