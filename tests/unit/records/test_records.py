# SPDX-License-Identifier: Apache-2.0
"""Claims: what a run records is what is read, in pandas too; a file is whole or not there; any text can be stored.

The budget leaves out whole groups, of every task alike; a resumed run leaves no step twice; a disk that is full costs
records and nothing else.
"""

from __future__ import annotations

import errno
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_g2rpo.records import writing
from megatron_g2rpo.records.reading import file_of, files_in, ranges, read_header, read_step, read_steps
from megatron_g2rpo.records.schema import RecordError, columns, storable
from megatron_g2rpo.records.writing import RolloutWriter, cut, drop_after, table_of
from tests.unit.records.rows import PARTS, SAMPLES, TASKS, header, known_table, long_table, row, step_table

DOCS = Path(__file__).parents[3] / "docs" / "records.md"


def writer(run: Path, notes: list[str] | None = None, *, period: int = 1, budget_mb: float = 1.0) -> RolloutWriter:
    note = print if notes is None else notes.append
    return RolloutWriter(run, period=period, budget_mb=budget_mb, last_step=10, note=note)


def record(to: RolloutWriter, step: int, rows: Callable[[int], pa.Table] = step_table) -> None:
    to.begin(rows(step), header(step))
    to.finish(known_table(), PARTS)


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    record(writer(tmp_path), 3)
    table, found = read_step(tmp_path, 3)
    assert found == replace(header(3), is_finished=True)
    assert table.schema.names == list(columns(PARTS))
    assert [field.type for field in table.schema] == list(columns(PARTS).values())
    expected = step_table(3).to_pylist()
    for line, sampled, known in zip(table.to_pylist(), expected, known_table().to_pylist(), strict=True):
        assert line == {**sampled, **known}


def test_kept_ids_are_written_as_lists_of_python_were(tmp_path: Path) -> None:
    """Matrices of any width, none, without a row, and without a column: equal tables, and equal files byte by byte."""
    numbers = np.random.default_rng(0)
    sizes = [(5, 3), None, (1, 7), (0, 4), (2, 0), None, (4, 3)]
    matrices = [None if size is None else numbers.integers(-1, 2**31 - 1, size) for size in sizes]
    matrices[-1] = matrices[-1][:, ::-1]  # not contiguous
    rows = [row(1, 0, number, kept_ids=matrix) for number, matrix in enumerate(matrices)]
    for some in (rows, rows[1:2], rows[:1], []):
        table = table_of(some, PARTS)
        lists = [None if each["kept_ids"] is None else each["kept_ids"].tolist() for each in some]
        place = table.schema.get_field_index("kept_ids")
        before = pa.array(lists, type=table.schema.field(place).type)
        assert table.column(place).combine_chunks().equals(before)
        table.validate(full=True)
        pq.write_table(table, tmp_path / "now")
        pq.write_table(table.set_column(place, "kept_ids", before), tmp_path / "before")
        assert (tmp_path / "now").read_bytes() == (tmp_path / "before").read_bytes()
    to = writer(tmp_path)
    to.begin(table_of(rows, PARTS), header(1, rollouts=len(rows)))
    assert read_step(tmp_path, 1)[0].column("kept_ids").to_pylist() == [
        None if m is None else m.tolist() for m in matrices
    ]


def test_an_id_that_the_column_cannot_hold_is_refused() -> None:
    with pytest.raises(pa.ArrowInvalid, match="2147483648"):
        table_of([row(1, 0, 0, kept_ids=np.array([[2**31]]))], PARTS)


def test_pandas_reads_all_steps_as_one_table(tmp_path: Path) -> None:
    to = writer(tmp_path)
    for step in (1, 2, 3):
        record(to, step)
    frame = pd.read_parquet(tmp_path / "rollouts")
    assert len(frame) == 3 * len(TASKS) * SAMPLES
    assert frame.groupby("step")["reward"].mean().tolist() == pytest.approx([0.55] * 3, rel=1e-12)
    assert read_steps(tmp_path, ["step", "task"], {2, 3}).num_rows == 2 * len(TASKS) * SAMPLES


def test_a_step_is_on_the_disk_before_its_updates_and_tells_that_they_were_not_taken(tmp_path: Path) -> None:
    writer(tmp_path).begin(step_table(1), header(1))  # and the process is killed
    table, found = read_step(tmp_path, 1)
    assert (found.is_whole, found.is_finished) == (True, False)
    assert table.column("response_ids").to_pylist() == step_table(1).column("response_ids").to_pylist()
    for name in ("advantage", "old_logprobs", "entropies"):
        assert table.column(name).null_count == table.num_rows
    with pytest.raises(RecordError, match="no record of the steps asked for"):
        read_steps(tmp_path)
    assert read_steps(tmp_path, with_unfinished=True).num_rows == table.num_rows


def test_steps_between_two_of_the_period_are_kept_only_where_they_failed(tmp_path: Path) -> None:
    to = writer(tmp_path, period=2)
    for step in (1, 2, 3, 4):
        record(to, step)
    to.begin(step_table(5), header(5))
    assert list(files_in(tmp_path)) == [2, 4, 5]
    assert not read_header(file_of(tmp_path, 5)).is_finished


@pytest.mark.parametrize(
    ("text", "stored"),
    [
        ("x" * 100_000, "x" * 100_000),
        ("<script>alert(1)</script>\0\x07", "<script>alert(1)</script>\0\x07"),
        ("\u202eright to left\u202c \u05d0\u05d1", "\u202eright to left\u202c \u05d0\u05d1"),
        ("half \ud83d and half \ude00", "half \ufffd and half \ufffd"),
        ("a pair \ud83d\ude00", "a pair \U0001f600"),
        ("", ""),
    ],
    ids=["100 kB", "HTML and control", "right to left", "broken surrogates", "surrogates of one character", "nothing"],
)
def test_any_text_of_a_model_can_be_stored(tmp_path: Path, text: str, stored: str) -> None:
    to = writer(tmp_path)
    to.begin(table_of([row(1, 0, 0, response_text=storable(text))], PARTS), header(1, rollouts=1))
    assert read_step(tmp_path, 1)[0].column("response_text").to_pylist() == [stored]


def test_a_text_that_is_not_made_storable_would_be_an_error() -> None:
    with pytest.raises(UnicodeEncodeError):
        table_of([row(1, 0, 0, response_text="\ud83d")], PARTS)


def test_a_part_that_a_task_lacks_and_a_reward_that_failed_are_null(tmp_path: Path) -> None:
    failed: dict[str, None] = dict.fromkeys(("reward", "reward_accuracy", "reward_format"))
    lines = [row(1, 0, 0, reward_format=None), row(1, 0, 1, masked="no reward", **failed)]
    writer(tmp_path).begin(table_of(lines, PARTS), header(1, rollouts=2))
    table = read_step(tmp_path, 1)[0]
    assert table.column("reward_format").to_pylist() == [None, None]
    assert table.column("reward").to_pylist() == [0.1, None]
    assert table.column("masked").to_pylist() == [None, "no reward"]


def test_a_column_that_the_schema_lacks_is_an_error() -> None:
    with pytest.raises(KeyError, match="rewrad"):
        table_of([row(1, 0, 0, rewrad=1.0)], PARTS)


# -- the budget -----------------------------------------------------------------------------------------------------


def test_the_budget_leaves_out_whole_groups_of_every_task_alike_and_says_so_once(tmp_path: Path) -> None:
    size = _size_of_a_step(tmp_path / "whole")
    notes: list[str] = []
    to = writer(tmp_path / "run", notes, budget_mb=10 * 0.7 * size / 1e6)
    for step in range(1, 11):
        record(to, step, long_table)
    assert sum(path.stat().st_size for path in files_in(tmp_path / "run").values()) <= 10 * 0.7 * size
    assert len(notes) == 1
    assert notes[0].startswith("warning: logger.rollouts.budget_mb leaves ")
    assert "cannot be replayed" in notes[0]
    for step in range(1, 11):
        table, found = read_step(tmp_path / "run", step)
        assert not found.is_whole
        assert found.rollouts == len(TASKS) * SAMPLES > table.num_rows
        groups = Counter(table.column("group_id").to_pylist())
        assert set(groups.values()) == {SAMPLES}, "a group is whole or not there"


def _size_of_a_step(run: Path) -> int:
    record(writer(run), 1, long_table)
    return file_of(run, 1).stat().st_size


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.7, 0.99])
def test_a_cut_is_balanced_deterministic_and_smaller(share: float) -> None:
    table = step_table(1)
    first, again = cut(table, share, seed=7), cut(table, share, seed=7)
    assert first.equals(again)
    assert first.num_rows < table.num_rows
    groups = dict(zip(first.column("group_id").to_pylist(), first.column("task").to_pylist(), strict=True))
    kept = Counter(groups.values())
    # A task with four groups gets no second one before every other task has one.
    if kept["chart"] > 1:
        assert {"math", "ocr"} <= kept.keys()


def test_another_step_keeps_other_groups() -> None:
    table = step_table(1)
    kept = {tuple(cut(table, 0.4, seed=seed).column("group_id").to_pylist()) for seed in range(20)}
    assert len(kept) > 1


def test_a_budget_that_holds_no_group_keeps_none_and_leaves_its_share_to_later_steps(tmp_path: Path) -> None:
    size = _size_of_a_step(tmp_path / "whole")
    to = writer(tmp_path / "run", [], budget_mb=1.2 * size / 1e6)
    for step in range(1, 11):
        record(to, step, long_table)
    # A tenth of it holds no group beside what a file costs by itself; what is left for the last steps does.
    kept = files_in(tmp_path / "run")
    assert 1 not in kept
    assert kept
    assert sum(path.stat().st_size for path in kept.values()) <= 1.2 * size


# -- what may go wrong ----------------------------------------------------------------------------------------------


def test_a_resumed_run_leaves_no_record_of_steps_that_it_takes_again(tmp_path: Path) -> None:
    to = writer(tmp_path)
    for step in (1, 2, 3, 4):
        record(to, step)
    (tmp_path / "rollouts" / "step_000005.parquet.partial").touch()
    drop_after(tmp_path, 2)
    assert sorted(path.name for path in (tmp_path / "rollouts").iterdir()) == [
        "step_000001.parquet",
        "step_000002.parquet",
    ]
    drop_after(tmp_path / "new", 0)  # where nothing was recorded


def test_the_budget_of_a_resumed_run_counts_what_is_there(tmp_path: Path) -> None:
    size = _size_of_a_step(tmp_path / "whole")
    for run, parts in (("straight", [range(1, 7)]), ("resumed", [range(1, 5), range(3, 7)])):
        for steps in parts:
            drop_after(tmp_path / run, steps[0] - 1)
            to = writer(tmp_path / run, [], budget_mb=7 * size / 1e6)
            for step in steps:
                record(to, step, long_table)
    rows = [read_steps(tmp_path / run, ["step", "group_id", "sample_index"]) for run in ("straight", "resumed")]
    assert rows[0].equals(rows[1])


def test_a_disk_that_is_full_is_said_once_and_leaves_no_part_of_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    to = writer(tmp_path, notes)
    record(to, 1)

    def full(self: pq.ParquetWriter, table: pa.Table) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(writing.pq.ParquetWriter, "write_table", full)
        record(to, 2)
        record(to, 3)
    record(to, 4)
    assert len(notes) == 1
    assert "No space left on device" in notes[0]
    assert "the run goes on without" in notes[0]
    assert sorted(path.name for path in (tmp_path / "rollouts").iterdir()) == [
        "step_000001.parquet",
        "step_000004.parquet",
    ]


def test_a_damaged_file_and_one_that_is_no_record_are_named(tmp_path: Path) -> None:
    record(writer(tmp_path), 1)
    path = file_of(tmp_path, 1)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(RecordError, match=re.escape(str(path)) + " is damaged"):
        read_step(tmp_path, 1)
    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(RecordError, match="is no record of a run"):
        read_header(path)
    with pytest.raises(RecordError, match="no record of step 2; recorded are 1"):
        read_step(tmp_path, 2)


def test_steps_are_named_as_ranges() -> None:
    assert ranges([1, 2, 3, 7, 9, 10]) == "1-3, 7, 9-10"
    assert ranges([]) == ""


def test_the_documentation_has_every_column_with_its_type() -> None:
    listed = dict(re.findall(r"^\| `(\w+|reward_<part>)` \| ([^|]+) \|", DOCS.read_text(), re.MULTILINE))
    types = {"int32": "int32", "string": "string", "bool": "bool", "float": "float32", "double": "float64"}

    def named(kind: pa.DataType) -> str:
        return f"list of {named(kind.value_type)}" if pa.types.is_list(kind) else types[str(kind)]

    expected = {name: named(kind) for name, kind in columns(["<part>"]).items()}
    assert {name: kind.strip() for name, kind in listed.items()} == expected
