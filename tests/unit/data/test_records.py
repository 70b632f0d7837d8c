# SPDX-License-Identifier: Apache-2.0
"""Rows are read one by one, as they are, out of every kind of source, without a network and without decoding images."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import datasets
import pytest

from megatron_g2rpo.data.errors import DataError
from megatron_g2rpo.data.importers import records
from megatron_g2rpo.data.importers.base import Rejected
from megatron_g2rpo.data.importers.records import Record, image_directory, read_records
from megatron_g2rpo.data.shard_writer import ShardWriter
from tests.unit.data.import_sources import picture, run, samples_of, write_json, write_lines, write_tar

ROW = {"problem": "Which?", "answer": "red"}
PNG = picture()


def read(source: Path, subset: str | None = None) -> list[tuple[str, Any]]:
    """Names without their folder, and fields, or the reason of a rejected row."""
    folder = f"{image_directory(source)}/"
    return [
        (row.name.removeprefix(folder), row.reason if isinstance(row, Rejected) else dict(row.fields))
        for row in read_records(source, subset)
    ]


@pytest.fixture
def table(tmp_path: Path) -> Any:
    """A dataset with encoded images, as the ``datasets`` library has it."""
    features = datasets.Features(
        {
            "problem": datasets.Value("string"),
            "answer": datasets.Value("string"),
            "images": datasets.List(datasets.Image()),
        }
    )
    rows = {"problem": ["Which?", "What?"], "answer": ["red", "1"], "images": [[{"bytes": PNG, "path": None}], []]}
    datasets.disable_progress_bars()
    return datasets.Dataset.from_dict(rows, features=features)


TABLE = [
    {"problem": "Which?", "answer": "red", "images": [{"bytes": PNG, "path": None}]},
    {"problem": "What?", "answer": "1", "images": []},
]


def test_a_json_list_with_mixed_types_nan_and_a_byte_order_mark(tmp_path: Path) -> None:
    rows = [{"answer": 1}, {"answer": "x", "more": float("nan")}, {"answer": [1, {"a": None}]}, 5]
    (tmp_path / "rows.json").write_bytes(b"\xef\xbb\xbf \n" + json.dumps(rows, indent=1).encode())
    assert read(tmp_path / "rows.json") == [
        ("rows.json:1", {"answer": 1}),
        ("rows.json:2", {"answer": "x", "more": None}),
        ("rows.json:3", {"answer": [1, {"a": None}]}),
        ("rows.json:4", "a row must be a JSON object"),
    ]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 1 << 20])
def test_a_json_list_is_the_same_whatever_pieces_it_is_read_in(tmp_path: Path, chunk: int) -> None:
    rows = [{"a": "x" * n, "b": [n, -n * 1.5e10]} for n in range(9)] + [12345, "text, with ] and [", True, []]
    path = write_json(tmp_path / "rows.json", rows)
    with path.open() as file:
        assert file.read(1) == "["
        found = list(records._rows_of_list(path, file, chunk))
    assert found == list(enumerate(rows, start=1))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"a": 1}, {"a": ', r"rows\.json: row 2: not valid JSON"),
        ('[{"a": 1} {"a": 2}]', r"rows\.json: after row 1: a comma or the closing bracket"),
        ('[{"a": 1}', r"rows\.json: after row 1: a comma or the closing bracket"),
        ('[{"a": 1}, ]', r"rows\.json: row 2: not valid JSON"),
        ("[", r"rows\.json: row 1: not valid JSON"),
        ('[{"a": 1}][{"a": 2}]', r"rows\.json: after row 1: the list is closed, and more follows"),
        ('{\n "data": [{"a": 1}]\n}', r"rows\.json is one JSON object over several lines"),
    ],
)
def test_a_broken_list_is_an_error_with_its_row(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(DataError, match=message):
        read(tmp_path / "rows.json")


def test_json_lines_in_files_of_both_names_lose_a_broken_line_alone(tmp_path: Path) -> None:
    for name in ("rows.json", "rows.jsonl"):
        path = write_lines(tmp_path / name, [ROW, "", "{", ROW | {"answer": "a\u2028b"}])
        assert read(path) == [
            (f"{name}:1", ROW), (f"{name}:3", "not valid JSON"), (f"{name}:4", ROW | {"answer": "a\u2028b"}),
        ]  # fmt: skip


def test_a_first_line_that_is_cut_off_is_lost_alone(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.json", ['{"a": ', ROW])
    assert read(path) == [("rows.json:1", "not valid JSON"), ("rows.json:2", ROW)]


def test_a_header_that_names_a_column_twice_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("problem,answer,answer\na,b,c\n")
    with pytest.raises(DataError, match=r"rows\.csv: the header has 'answer' twice"):
        read(tmp_path / "rows.csv")


def test_csv_keeps_text_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text('problem,answer,more\n"Which,\nred?",01,\nb,NA,3.0\nshort\n')
    assert read(tmp_path / "rows.csv") == [
        ("rows.csv:2", {"problem": "Which,\nred?", "answer": "01"}),
        ("rows.csv:4", {"problem": "b", "answer": "NA", "more": "3.0"}),
        ("rows.csv:5", "more or fewer fields than the header has"),
    ]
    (tmp_path / "pandas.csv").write_text(",problem,answer\n0,a,b\n")
    assert read(tmp_path / "pandas.csv") == [("pandas.csv:2", {"problem": "a", "answer": "b"})]
    (tmp_path / "rows.tsv").write_text("problem\tanswer\na, b\tc\n")
    assert read(tmp_path / "rows.tsv") == [("rows.tsv:2", {"problem": "a, b", "answer": "c"})]


def test_parquet_gives_image_bytes_as_they_are(tmp_path: Path, table: Any) -> None:
    table.to_parquet(tmp_path / "rows.parquet")
    assert read(tmp_path / "rows.parquet") == [("rows.parquet:1", TABLE[0]), ("rows.parquet:2", TABLE[1])]
    run("easyr1", tmp_path / "rows.parquet", tmp_path / "out", task="t", answer_format="exact")
    assert PNG in (tmp_path / "out" / "shard-000000.tar").read_bytes()
    assert [len(sample.images) for sample in samples_of(tmp_path / "out")] == [1, 0]


def test_a_folder_of_parquet_is_one_split_that_is_named_where_there_are_several(tmp_path: Path, table: Any) -> None:
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    table.to_parquet(folder / "data" / "train-00000-of-00001.parquet")
    assert [fields for _, fields in read(folder)] == TABLE
    table.select([1]).to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    with pytest.raises(DataError, match=r"set has several splits; name .*set@train, .*set@test"):
        read(folder)
    assert [(name.rpartition("/")[2], fields) for name, fields in read(tmp_path / "set@test")] == [
        ("set@test:1", TABLE[1])
    ]
    with pytest.raises(DataError, match="no split 'tset'"):
        read(tmp_path / "set@tset")
    with pytest.raises(DataError, match="cannot be read as a dataset: ValueError: BuilderConfig 'x' not found"):
        read(folder, subset="x")


def test_a_dataset_that_was_saved_to_disk(tmp_path: Path, table: Any) -> None:
    table.save_to_disk(tmp_path / "one")
    assert [fields for _, fields in read(tmp_path / "one")] == TABLE
    datasets.DatasetDict(train=table, val=table.select([0])).save_to_disk(tmp_path / "two")
    assert [fields for _, fields in read(tmp_path / "two@val")] == TABLE[:1]
    with pytest.raises(DataError, match=r"several splits; name .*two@train, .*two@val"):
        read(tmp_path / "two")


def test_the_classes_of_a_dataset_are_their_names(tmp_path: Path) -> None:
    features = datasets.Features({"question": datasets.Value("string"), "label": datasets.ClassLabel(names=["a", "b"])})
    table = datasets.Dataset.from_dict({"question": ["?"] * 3, "label": [1, 0, None]}, features=features)
    table.save_to_disk(tmp_path / "saved")
    table.to_parquet(tmp_path / "rows.parquet")
    for source in ("saved", "rows.parquet"):
        assert [fields["label"] for _, fields in read(tmp_path / source)] == ["b", "a", None]


def test_a_webdataset_of_others_is_mapped_by_suffix(tmp_path: Path) -> None:
    members = {
        "a/1.10.png": picture(10),
        "a/1.2.png": picture(2),
        "a/1.txt": b"Which? \n",
        "a/1.cls": b"3",
        "a/2.json": json.dumps({"caption": "red"}).encode(),
        "a/2.jpg": picture(3, "jpeg"),
        "a/3.json": b"{",
    }
    folder = tmp_path / "tars"
    folder.mkdir()
    path = write_tar(folder / "x.tar", members)
    write_tar(folder / "y.tar", {"4.txt": b"four"})
    one = {"txt": "Which?", "cls": "3", "images": [picture(2), picture(10)]}
    two = {"caption": "red", "images": [picture(3, "jpeg")]}
    broken = "a member is not valid JSON or UTF-8 text"
    assert read(path) == [("x.tar:a/1", one), ("x.tar:a/2", two), ("x.tar:a/3", broken)]
    assert [fields for _, fields in read(folder)] == [one, two, broken, {"txt": "four"}]
    mapped = {"map": ("question=txt", "answer=cls")}
    result = run("fields", path, tmp_path / "out", mapped, task="t", answer_format="exact")
    assert sum(result.samples.values()) == 1
    assert result.images == 2


def test_a_tar_of_which_a_part_is_lost_gives_no_row(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "x.tar", {f"{n}.json": json.dumps(ROW).encode() for n in range(6)}).read_bytes()
    assert len(read(tmp_path / "x.tar")) == 6
    third = 3 * 1024  # a header and a block of content each
    damaged = whole[:third] + b"\x99" * 512 + whole[third + 512 :]
    for part in (whole[:third], whole[: third + 100], whole[: third + 600], damaged):
        (tmp_path / "x.tar").write_bytes(part)
        with pytest.raises(DataError, match=r"x\.tar: (ends at byte|damaged at byte|not a readable tar)"):
            read(tmp_path / "x.tar")


def test_members_of_a_tar_that_others_have_packed(tmp_path: Path) -> None:
    row = json.dumps(ROW).encode()
    members = {
        "._22.05.json": b"\0\5",
        "README.md": b"about",
        "__MACOSX__/22.05.json": b"{}",
        "22.05.JSON": row,  # the case of suffixes and dots in keys do not matter
        "b.json": json.dumps(ROW | {"images": ["0.png", "1.png"]}).encode(),
        "c.json": b"[" * 100_000 + b"]" * 100_000,
        "22.05.PNG": PNG,  # not beside its json
        "b.0.png": PNG,
    }
    assert read(write_tar(tmp_path / "x.tar", members)) == [
        ("x.tar:22.05", ROW | {"images": [PNG]}),
        ("x.tar:b", "the json names an image that the tar lacks"),
        ("x.tar:c", "a member is not valid JSON or UTF-8 text"),
    ]
    (tmp_path / "._x.tar").write_bytes(b"\0\5\x16\7")
    assert len(read(tmp_path)) == 3


def test_a_member_twice_and_a_link_reject_their_row(tmp_path: Path) -> None:
    link = tarfile.TarInfo("b.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("a.json", "a.json", "b.json", "c.json"):
            member = tarfile.TarInfo(name)
            member.size = len(b"{}")
            tar.addfile(member, io.BytesIO(b"{}"))
        tar.addfile(link)
    assert read(tmp_path / "x.tar") == [
        ("x.tar:a", "a member occurs twice"),
        ("x.tar:b", "a member is a link, a device or stored sparsely; pack the files themselves"),
        ("x.tar:c", {}),
    ]


def test_shards_of_our_own_can_be_imported_again(tmp_path: Path) -> None:
    fields = {"task": "t", "question": "Which?", "answer": "red", "answer_format": "exact", "note": "mine"}
    with ShardWriter(tmp_path / "shards") as writer:
        writer.write("a", fields, [picture(1), picture(2)])
    run("jsonl", tmp_path / "shards", tmp_path / "out")
    (sample,) = samples_of(tmp_path / "out")
    assert sample.extra == {"note": "mine"}
    assert [image.getpixel((0, 0)) for image in sample.images] == [(1, 0, 0), (2, 0, 0)]


def test_the_one_file_of_a_folder_is_meant_by_it(tmp_path: Path) -> None:
    write_lines(tmp_path / "rows.jsonl", [ROW])
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "out.rejected.jsonl").write_text("{}")  # of an earlier import
    assert read(tmp_path) == [("rows.jsonl:1", ROW)]
    write_lines(tmp_path / "more.jsonl", [ROW])
    with pytest.raises(DataError, match=r"holds 2 files of rows \(more\.jsonl, rows\.jsonl \.\.\.\); name one"):
        read(tmp_path)


def test_what_is_no_source_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere\.json does not exist"):
        read(tmp_path / "nowhere.json")
    (tmp_path / "a.xlsx").write_bytes(b"x")
    with pytest.raises(DataError, match=r"a\.xlsx is of no kind that is read; convert it to one of \.json"):
        read(tmp_path / "a.xlsx")
    (tmp_path / "latin.jsonl").write_bytes(b'{"a": "\xe9"}')
    with pytest.raises(DataError, match=r"latin\.jsonl is not UTF-8 text"):
        read(tmp_path / "latin.jsonl")
    for name, message in (("a.parquet", "cannot be read as Parquet"), ("a.tar", "not a readable tar shard")):
        (tmp_path / name).write_bytes(b"nothing of the kind" * 100)
        with pytest.raises(DataError, match=message):
            read(tmp_path / name)
    with pytest.raises(DataError, match="is a file: a split"):
        read(write_json(tmp_path / "rows.json", [ROW]), subset="x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty cannot be read as a dataset"):
        read(tmp_path / "empty")


def test_reading_is_lazy(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [ROW] * 3)
    rows = read_records(path)
    first = next(rows)
    assert isinstance(first, Record)
    assert first.fields == ROW
    rows.close()
