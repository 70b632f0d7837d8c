# SPDX-License-Identifier: Apache-2.0
"""The recorded rollouts of a run: an overview of all of them, and in full those that are asked for.

Files are read one at a time, so that memory holds the overview (some forty bytes a rollout) and not the tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from megatron_g2rpo.records.reading import files_in, read_header
from megatron_g2rpo.records.schema import REWARD_PREFIX, RecordError
from megatron_g2rpo.report.metrics import ReportError

_PLAIN = ("step", "group_id", "sample_index", "reward", "advantage", "truncated")
_NAMED = ("task", "prompt_key")


@dataclass(frozen=True, kw_only=True)
class Overview:
    """What all recorded rollouts are like, a row each, in the order of the files; ``N`` rows.

    Attributes:
        files: the Parquet files.
        file: int32 ``[N]``, number of the row's file in ``files``.
        row: int32 ``[N]``, number of the row in its file.
        step: int32 ``[N]``.
        task: str ``[N]``.
        prompt_key: str ``[N]``.
        group_id: int64 ``[N]``, unique within a step.
        sample_index: int32 ``[N]``.
        reward: float64 ``[N]``, NaN where there is none.
        advantage: float64 ``[N]``, NaN where there is none.
        truncated: bool ``[N]``.
        tokens: int64 ``[N]``, response tokens.
        characters: int64 ``[N]``, of the response.
        parts: reward part -> float64 ``[N]``, NaN where the task lacks it.
    """

    files: Sequence[Path]
    file: np.ndarray
    row: np.ndarray
    step: np.ndarray
    task: np.ndarray
    prompt_key: np.ndarray
    group_id: np.ndarray
    sample_index: np.ndarray
    reward: np.ndarray
    advantage: np.ndarray
    truncated: np.ndarray
    tokens: np.ndarray
    characters: np.ndarray
    parts: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.step)

    def groups(self) -> list[np.ndarray]:
        """Return the rows of each group, ordered by step, group id and the place in the group."""
        if not len(self):
            return []
        order = np.lexsort((self.sample_index, self.group_id, self.step))
        step, group = self.step[order], self.group_id[order]
        starts = np.flatnonzero((np.diff(step) != 0) | (np.diff(group) != 0)) + 1
        return np.split(order, starts)


def read_overview(run: Path) -> Overview | None:
    """Read the overview of the steps that a run has recorded; None where there are none.

    A step that failed or is under way is left out, and so is a file that vanishes meanwhile: the run goes on.

    Raises:
        ReportError: a file is damaged, or is of a later release; names it.
    """
    files, tables = [], []
    for path in files_in(run).values():
        try:
            if read_header(path).is_finished:
                tables.append(_overview_of(path, len(files)))
                files.append(path)
        except FileNotFoundError:
            continue
        except RecordError as error:
            raise ReportError(str(error)) from error
    if not tables:
        return None
    names = {name for table in tables for name in table if name.startswith(REWARD_PREFIX)}
    for table in tables:  # a part that came or went with a resumed run
        table.update({name: np.full(len(table["step"]), np.nan) for name in names - table.keys()})
    whole = {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}
    parts = {name.removeprefix(REWARD_PREFIX): whole.pop(name) for name in sorted(names)}
    return Overview(files=files, parts=parts, **whole)


def read_rows(overview: Overview, rows: np.ndarray) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield rows of the overview in full, a file at a time: the number of the row, and column -> value.

    Raises:
        ReportError: a file changed or vanished since the overview was read; names it.
    """
    for number in np.unique(overview.file[rows]):
        mine = rows[overview.file[rows] == number]
        path = overview.files[number]
        try:
            table = pq.read_table(path).take(pa.array(overview.row[mine]))
        except (OSError, pa.ArrowException, IndexError) as error:
            raise ReportError(f"{path} cannot be read ({error}); start the report again") from error
        yield from zip(mine.tolist(), table.to_pylist(), strict=True)


def _overview_of(path: Path, number: int) -> dict[str, np.ndarray]:
    try:
        held = pq.read_schema(path).names
        parts = [name for name in held if name.startswith(REWARD_PREFIX)]
        table = pq.read_table(path, columns=[*_PLAIN, *_NAMED, *parts, "response_ids", "response_text"])
        columns = {name: table.column(name) for name in [*_PLAIN, *parts]}
        named = {name: table.column(name).to_pylist() for name in _NAMED}
        tokens = pc.list_value_length(table.column("response_ids"))  # pyright: ignore[reportAttributeAccessIssue]
        characters = pc.binary_length(table.column("response_text"))  # pyright: ignore[reportAttributeAccessIssue]
    except (KeyError, pa.ArrowException) as error:
        raise ReportError(f"{path} is no record of rollouts ({error}); remove it") from error
    found = {name: np.asarray(column.to_numpy()) for name, column in columns.items()}
    floats = ("reward", "advantage", *parts)
    found.update({name: found[name].astype(np.float64) for name in floats})
    found.update({name: np.array(values, dtype=object) for name, values in named.items()})
    rows = len(found["step"])
    return {
        **found,
        "truncated": found["truncated"].astype(bool),
        "tokens": np.asarray(tokens.to_numpy()),
        "characters": np.asarray(characters.to_numpy()),
        "file": np.full(rows, number, dtype=np.int32),
        "row": np.arange(rows, dtype=np.int32),
    }
