# SPDX-License-Identifier: Apache-2.0
"""Writes the files of a run's rollouts: one a step, whole or not at all, and all together within a budget.

A step is written twice. As soon as it is sampled with all that is known then, whole: whatever ends the process in an
update, the file is there to be replayed. After its updates with the rest, cut to what the budget leaves, or removed if
it is not the step's turn. What fails is said once, and never ends the run.
"""

from __future__ import annotations

import math
import zlib
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from megatron_g2rpo.records.reading import file_of, files_in
from megatron_g2rpo.records.schema import Header, columns

_PARTIAL = ".partial"
_MEGABYTE = 1_000_000
_NONE = np.empty(0, dtype=np.int64)
# Prompts repeat within a group, and token ids in every answer; a dictionary of floats would cost more than it saves.
_ENCODING: dict[str, Any] = {
    "use_dictionary": [
        *("step", "update", "weights_version", "data_rank", "task", "prompt_key", "group_id", "sample_index"),
        *("prompt_text", "question", "reference", "answer_format", "images.list.element"),
        *("image_widths.list.element", "image_heights.list.element"),
        *("answer", "response_ids.list.element", "masked", "engine", "seconds"),
    ],
    "write_statistics": ["step", "task", "reward", "advantage"],
}


def table_of(rows: Sequence[Mapping[str, Any]], parts: Sequence[str], names: Collection[str] | None = None) -> pa.Table:
    """Return rows as a table with the columns of the schema; what a row lacks is null.

    Args:
        rows: column -> value, each; no other names. A list of lists is a matrix of integers, ``[R, K]``.
        parts: names of the reward's parts.
        names: the columns that the table has; None for all.

    Raises:
        KeyError: a row has a column that the table lacks.
    """
    types = {name: each for name, each in columns(parts).items() if names is None or name in names}
    for row in rows:
        if foreign := row.keys() - types.keys():
            raise KeyError(f"no column of a record: {', '.join(sorted(foreign))}")
    return pa.table({name: _column([row.get(name) for row in rows], each) for name, each in types.items()})


def _column(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    is_nested = pa.types.is_list(kind) and pa.types.is_list(kind.value_type)
    return _lists_of_lists(values).cast(kind) if is_nested else pa.array(values, type=kind)


def _lists_of_lists(matrices: Sequence[NDArray[np.int64] | None]) -> pa.ListArray:
    """Return each matrix as a list of its rows, whose numbers never become objects of Python: a step has millions."""
    present = [matrix for matrix in matrices if matrix is not None]
    widths = [np.full(len(matrix), matrix.shape[1]) for matrix in present]
    numbers = np.concatenate([_NONE, *(matrix.ravel() for matrix in present)])
    rows = pa.ListArray.from_arrays(_offsets(np.concatenate([_NONE, *widths])), pa.array(numbers))
    lengths = np.array([0 if matrix is None else len(matrix) for matrix in matrices], dtype=np.int64)
    is_null = pa.array([matrix is None for matrix in matrices], type=pa.bool_())
    return pa.ListArray.from_arrays(_offsets(lengths), rows, mask=is_null)


def _offsets(lengths: NDArray[np.int64]) -> pa.Array:
    """Where lists of these lengths begin and end; Arrow counts in 32 bits, and the cast refuses more."""
    return pa.array(np.concatenate([[0], lengths.cumsum()])).cast(pa.int32())


class RolloutWriter:
    """Writes the rollouts of a run, in one process of it.

    Args:
        run: the run directory.
        period: number of steps between two that are kept.
        budget_mb: megabytes (10^6 bytes) that the files of the run take together, at most.
        last_step: the step that the run ends after, over which the budget is spread.
        note: shows the user a line.
    """

    def __init__(
        self, run: Path, *, period: int, budget_mb: float, last_step: int, note: Callable[[str], None]
    ) -> None:
        self._run, self._period, self._last_step = run, period, last_step
        self._budget = budget_mb * _MEGABYTE
        self._note = note
        self._has_failed = self._has_cut = False
        self._spent: int | None = None  # bytes of the steps before, once they were looked at
        self._pending: tuple[pa.Table, Header] | None = None

    def begin(self, table: pa.Table, header: Header) -> None:
        """Write a step that was sampled, whole.

        Args:
            table: all rollouts of the step, in the order of group and sample.
            header: what the file says of itself.
        """
        self._pending = table, header
        self._safely(lambda: self._write(table, header))

    def finish(self, known: pa.Table, parts: Sequence[str]) -> None:
        """Write the step that was begun anew, with what its updates made known; keep what the budget allows.

        Args:
            known: columns that take the place of those of ``begin``, a row for each of theirs.
            parts: names of the reward's parts, those of ``begin`` and perhaps more.
        """
        assert self._pending is not None
        (table, header), self._pending = self._pending, None
        if header.step % self._period:
            self._safely(lambda: file_of(self._run, header.step).unlink(missing_ok=True))
            return
        both = {name: (known if name in known.column_names else table).column(name) for name in columns(parts)}
        whole = replace(header, parts=tuple(parts), is_finished=True)
        self._safely(lambda: self._keep(pa.table(both), whole))

    def _keep(self, table: pa.Table, header: Header) -> None:
        """Write a step within what the budget leaves it: the rest, shared out evenly over the steps to come."""
        path = file_of(self._run, header.step)
        if self._spent is None:
            self._spent = sum(each.stat().st_size for each in files_in(self._run).values() if each != path)
        left = max((self._last_step - header.step) // self._period + 1, 1)
        allowed = (self._budget - self._spent) / left
        size = self._write(table, header, allowed)
        while size > allowed:
            if not self._has_cut:
                self._has_cut = True
                self._note(
                    f"warning: logger.rollouts.budget_mb leaves {allowed / 1000:.0f} of a step's {size / 1000:.0f} kB: "
                    "whole groups are left out, of every task alike; steps with fewer cannot be replayed"
                )
            # A little less than its share: texts differ, and a second attempt costs as much as the first.
            table = cut(table, 0.95 * allowed / size, seed=header.step)
            if not table.num_rows:
                path.unlink(missing_ok=True)
                return
            size = self._write(table, replace(header, is_whole=False), allowed)
        self._spent += size

    def _write(self, table: pa.Table, header: Header, allowed: float = math.inf) -> int:
        """Write a file beside its place, and rename it if it is not larger than allowed; return its size in bytes.

        What has its name is what stays: a reader between two of them would meet rows that move.
        """
        path = file_of(self._run, header.step)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + _PARTIAL)
        try:
            with pq.ParquetWriter(
                partial,
                table.schema,
                compression="zstd",
                **_ENCODING,
                store_schema=False,  # two kilobytes a file; Parquet's own types say the same
            ) as writer:
                writer.add_key_value_metadata(header.metadata())
                writer.write_table(table)
            size = partial.stat().st_size
            if size > allowed:
                partial.unlink()
            else:
                partial.replace(path)
        except OSError:
            partial.unlink(missing_ok=True)
            raise
        return size

    def _safely(self, write: Callable[[], Any]) -> None:
        try:
            write()
        except OSError as error:
            if not self._has_failed:
                self._has_failed = True
                self._note(f"warning: rollouts cannot be recorded ({error}); the run goes on without")


def cut(table: pa.Table, share: float, *, seed: int) -> pa.Table:
    """Return about a share of a step's rows: whole groups, of every task in turn; the same ones whenever it is asked.

    Tasks are taken from in turn, so that of a task with few groups more are kept than of one with many.

    Args:
        table: rows with ``task`` and ``group_id``.
        share: share of the table's bytes that is kept, at most; below 1.
        seed: says which groups of a task come first.

    Returns:
        The rows that are kept, in their order; at least one group less than the table had.
    """
    task_of: dict[int, str] = {}
    rows: defaultdict[int, list[int]] = defaultdict(list)
    for row, (group, task) in enumerate(
        zip(table.column("group_id").to_pylist(), table.column("task").to_pylist(), strict=True)
    ):
        task_of[group] = task
        rows[group].append(row)
    # Bytes follow tokens and characters; a row has some for itself.
    texts = table.column("response_text").to_pylist()
    lengths = [len(ids) for ids in table.column("response_ids").to_pylist()]
    cost = {group: sum(64 + 12 * lengths[i] + len(texts[i]) for i in mine) for group, mine in rows.items()}
    queues: defaultdict[str, list[int]] = defaultdict(list)
    for group in sorted(task_of, key=lambda group: (zlib.crc32(f"{seed}/{group}".encode()), group)):
        queues[task_of[group]].append(group)
    in_turn = [
        group
        for place in range(max(map(len, queues.values()), default=0))
        for _, queue in sorted(queues.items())
        for group in queue[place : place + 1]
    ]
    kept: set[int] = set()
    left = share * sum(cost.values())
    for group in in_turn[: len(in_turn) - 1]:
        left -= cost[group]
        if left < 0:
            break
        kept.add(group)
    return table.take(pa.array(sorted(row for group in kept for row in rows[group]), type=pa.int64()))


def drop_after(run: Path, step: int) -> None:
    """Remove the rollouts of steps that a run takes again, and what a killed one had begun to write.

    Args:
        run: the run directory.
        step: the step that the run goes on from.

    Raises:
        OSError: a file cannot be removed.
    """
    for number, path in files_in(run).items():
        if number > step:
            path.unlink()
    for path in (file_of(run, 0).parent).glob(f"step_*{_PARTIAL}"):
        path.unlink()
