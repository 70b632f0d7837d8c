# SPDX-License-Identifier: Apache-2.0
"""Tars as other people's programs make them: what is no sample is left out and said, what is damaged is named."""

import io
import json
import subprocess
import sys
import tarfile

import pytest

from megatron_g2rpo.data.errors import DataError, SampleError
from megatron_g2rpo.data.fields import REQUIRED_FIELDS
from megatron_g2rpo.data.shard_index import ShardIndex
from megatron_g2rpo.data.shard_writer import ShardWriter, write_index
from tests.unit.data.conftest import make_fields, make_png


def record(number=0, images: object = (), **changes):
    return json.dumps(make_fields("vqa", number) | {"images": images} | changes).encode()


def write_tar(path, members):
    """Write members in order, of (name, content) pairs or a mapping."""
    with tarfile.open(path, "w") as tar:
        for name, data in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def keys(directory):
    index = ShardIndex(directory)
    return [entry.key for task in index.tasks for entry in index.entries(task)]


def test_what_packers_leave_behind_is_no_sample_and_no_word(tmp_path, caplog):
    members = {
        "._a.json": b"\0\5\x16\7",
        "a.json": record(images=["0.png"]),
        "._a.0.png": b"\0",
        "a.0.png": make_png(0),
        ".DS_Store": b"",
        "sub/.DS_Store": b"",
        "__meta__/info.json": b"{}",
        "__MACOSX__/sub/b.json": b"{}",
        "__index__": b"",
    }
    write_tar(tmp_path / "s.tar", members)
    write_index(tmp_path)
    assert keys(tmp_path) == ["a"]
    assert caplog.messages == []


def test_the_double_that_macos_leaves_beside_a_shard_is_no_shard(tmp_path):
    write_tar(tmp_path / "s.tar", {"a.json": record()})
    (tmp_path / "._s.tar").write_bytes(b"\0\5\x16\7")
    write_index(tmp_path)
    assert keys(tmp_path) == ["a"]
    (tmp_path / "s.tar").unlink()
    ShardWriter(tmp_path)  # nothing here that it would overwrite


def test_members_of_no_sample_are_left_out_and_counted(tmp_path, caplog):
    members = {"README.md": b"", "LICENSE": b"", ".json": b"{}", "a.json": record(), "b.0.png": make_png(0)}
    write_tar(tmp_path / "s.tar", members)
    write_index(tmp_path)
    assert keys(tmp_path) == ["a"]
    (message,) = caplog.messages
    assert message.startswith("shard s.tar: 4 members belong to no sample")
    assert "README.md, LICENSE, .json, b.0.png" in message


@pytest.mark.parametrize("members", [{}, {"README.md": b""}, {"a.0.png": b""}])
def test_shards_without_a_sample_are_an_error(tmp_path, members):
    write_tar(tmp_path / "s.tar", members)
    with pytest.raises(DataError, match=r"its 1 shards hold no sample; a sample is a member KEY\.json"):
        write_index(tmp_path)


def test_a_member_belongs_to_the_longest_key_that_has_a_json(tmp_path):
    members = {
        "22.json": record(0, ["0.png"]),
        "22.0.png": make_png(0),
        "d.r/22.05.json": record(1, ["0.png", "1.png"]),
        "d.r/22.05.0.png": make_png(1),
        "d.r/22.05.1.png": make_png(2),
        "22.05.json": record(2),
    }
    write_tar(tmp_path / "s.tar", members)
    write_index(tmp_path)
    index = ShardIndex(tmp_path)
    assert [(entry.key, list(entry.members)) for entry in index.entries("vqa")] == [
        ("22", ["json", "0.png"]),
        ("d.r/22.05", ["json", "0.png", "1.png"]),
        ("22.05", ["json"]),
    ]
    assert len(list(index.read(index.entries("vqa")[1]).images)) == 2


def test_a_second_json_without_a_sample_s_fields_is_a_member(tmp_path):
    write_tar(tmp_path / "s.tar", {"a.json": record(), "a.meta.json": b'{"source": "web"}'})
    write_index(tmp_path)
    (entry,) = ShardIndex(tmp_path).entries("vqa")
    assert list(entry.members) == ["json", "meta.json"]


def test_a_second_json_that_is_broken_is_not_taken_for_a_member(tmp_path):
    write_tar(tmp_path / "s.tar", {"a.json": record(), "a.05.json": b'{"task": '})
    with pytest.raises(SampleError, match=r"sample 'a\.05': broken json"):
        write_index(tmp_path)


def test_the_case_of_suffixes_does_not_matter(tmp_path):
    write_tar(tmp_path / "s.tar", {"A.JSON": record(images=["0.Png"]), "A.0.PNG": make_png(0, 5, 4)})
    write_index(tmp_path)
    index = ShardIndex(tmp_path)
    (entry,) = index.entries("vqa")
    assert entry.key == "A"
    assert [image.size for image in index.read(entry).images] == [(5, 4)]


def test_members_of_a_sample_need_not_be_neighbours(tmp_path):
    members = {"a.0.png": make_png(0), "b.json": record(), "a.json": record(images=["0.png"])}
    write_tar(tmp_path / "s.tar", members)
    write_index(tmp_path)
    assert sorted(keys(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize(("second", "suffix"), [("a.json", "json"), ("a.JSON", "json"), ("a.0.png", "0.png")])
def test_a_member_twice_in_one_shard_is_named(tmp_path, second, suffix):
    members = [("a.json", record(images=["0.png"])), ("a.0.png", make_png(0))]
    write_tar(tmp_path / "s.tar", [*members, ("b.json", record()), (second, dict(members).get(second, record()))])
    with pytest.raises(SampleError, match=rf"shard s\.tar, sample 'a': has the member '{suffix}' twice"):
        write_index(tmp_path)


def test_shards_may_each_count_from_0(tmp_path):
    for number, shard in enumerate(("s.tar", "t.tar")):
        write_tar(tmp_path / shard, {"000000.json": record(number), "000001.json": record(number + 2)})
    write_index(tmp_path)
    index = ShardIndex(tmp_path)
    entries = index.entries("vqa")
    assert [entry.name for entry in entries] == ["s/000000", "s/000001", "t/000000", "t/000001"]
    assert [index.read(entry).answer for entry in entries] == ["black", "green", "blue", "red"]


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (tarfile.SYMTYPE, "member '0.png' is a link or device"),
        (tarfile.LNKTYPE, "member '0.png' is a link or device"),
        (tarfile.FIFOTYPE, "member '0.png' is a link or device"),
        (tarfile.GNUTYPE_SPARSE, "member '0.png' is stored sparsely"),
    ],
)
def test_members_that_are_no_plain_files_are_named(tmp_path, kind, message):
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        data = record(images=["0.png"])
        info = tarfile.TarInfo("a.json")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
        other = tarfile.TarInfo("a.0.png")
        other.type, other.linkname = kind, "b.0.png"
        if kind == tarfile.GNUTYPE_SPARSE:
            header = bytearray(other.tobuf(tarfile.GNU_FORMAT))
            header[483:495] = b"%011o\0" % (40 * 2**30)  # its size as a file: 40 GB of holes
            header[148:156] = b"        "
            header[148:156] = b"%06o\0 " % sum(header)
            tar.fileobj.write(header)
            tar.offset += len(header)
        else:
            tar.addfile(other)
    with pytest.raises(SampleError, match=f"shard s.tar, sample 'a': {message}"):
        write_index(tmp_path)


def test_a_tar_that_is_cut_or_damaged_anywhere_is_never_indexed_in_part(tmp_path):
    """At a header that it cannot read, tarfile stops as at the end; so half of the samples would be lost silently."""
    path = write_tar(tmp_path / "s.tar", {f"{i}.json": record(i) for i in range(4)})
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        borders = [member.offset for member in tar]
    for border in borders[1:]:
        path.write_bytes(whole[:border])
        with pytest.raises(DataError, match=rf"s\.tar: ends at byte {border} after a member, .*: the rest was cut off"):
            write_index(tmp_path)
        path.write_bytes(whole[: border + 200])
        with pytest.raises(DataError, match=rf"s\.tar: damaged at byte {border}"):
            write_index(tmp_path)
        path.write_bytes(whole[:border] + b"\xaa" * 512 + whole[border + 512 :])
        with pytest.raises(DataError, match=rf"s\.tar: damaged at byte {border}"):
            write_index(tmp_path)
        path.write_bytes(whole[: border + 512 + 10])
        with pytest.raises(DataError, match=r"s\.tar: not a readable tar shard"):
            write_index(tmp_path)
        path.write_bytes(whole[:border] + bytes(512) + whole[border + 512 :])
        with pytest.raises(DataError, match=rf"s\.tar: holds more after the zeros at byte {border}"):
            write_index(tmp_path)
    path.write_bytes(whole + whole)
    with pytest.raises(DataError, match="tars were joined by cat"):
        write_index(tmp_path)
    path.write_bytes(whole)
    write_index(tmp_path)
    assert keys(tmp_path) == ["0", "1", "2", "3"]


@pytest.mark.parametrize("content", [b"no tar at all" * 100, b""])
def test_a_file_that_is_no_tar_is_named(tmp_path, content):
    (tmp_path / "s.tar").write_bytes(content)
    with pytest.raises(DataError, match=r"s\.tar: not a readable tar shard"):
        write_index(tmp_path)


def test_a_shard_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "s.tar").mkdir()
    with pytest.raises(DataError, match=r"s\.tar: cannot be read \(Is a directory\)"):
        write_index(tmp_path)


@pytest.mark.parametrize("field", REQUIRED_FIELDS)
def test_a_missing_field_is_named(tmp_path, field):
    fields = json.loads(record())
    del fields[field]
    write_tar(tmp_path / "s.tar", {"a.json": json.dumps(fields).encode()})
    with pytest.raises(SampleError, match=f"shard s.tar, sample 'a': lacks the field '{field}'"):
        write_index(tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "broken json"),
        (b"\xff", "broken json"),
        (b"[" * 200_000, "broken json"),
        (b'{"answer": ' + b"9" * 5000 + b"}", "broken json"),
        (b"[]", "the json must be an object, not list"),
        (record(images=["0.png"]), r"names image '0\.png', which is not there; it has json"),
        (record(answer=None), "field 'answer' is null"),
        (record(answer=True), "field 'answer' is true"),
        (record(question="\ud800"), "field 'question' is no valid Unicode"),
        (record(task=None), "field 'task' is null"),
        (record(images=[], task=["vqa"]), "field 'task' must be a text, not a list"),
    ],
)
def test_a_broken_sample_is_named_or_left_out(tmp_path, caplog, data, message):
    write_tar(tmp_path / "s.tar", {"a.json": data, "b.json": record()})
    with pytest.raises(SampleError, match=f"^shard s.tar, sample 'a': {message}"):
        write_index(tmp_path)
    write_index(tmp_path, skip_bad=True)
    assert keys(tmp_path) == ["b"]
    (said,) = caplog.messages
    assert said.startswith("left out: shard s.tar, sample 'a': ")


def test_values_of_other_types_are_read_as_they_were_indexed(tmp_path):
    members = {
        "a.json": record(answer=3, task=7, images=None),
        "b.json": record(answer=[1, 2], task="7", images="0.png"),
        "b.0.png": make_png(0),
    }
    write_tar(tmp_path / "s.tar", members)
    write_index(tmp_path)
    index = ShardIndex(tmp_path)
    assert index.tasks == ("7",)
    samples = [index.read(entry) for entry in index.entries("7")]
    assert [(sample.answer, sample.task, len(sample.images)) for sample in samples] == [
        ("3", "7", 0),
        ("[1, 2]", "7", 1),
    ]


def test_the_command_line_names_what_it_leaves_out(tmp_path):
    write_tar(tmp_path / "s.tar", {"a.json": b"{", "b.json": record()})
    command = [sys.executable, "-m", "megatron_g2rpo.data.shard_writer", str(tmp_path)]
    strict = subprocess.run(command, capture_output=True, text=True, check=False)
    assert strict.returncode == 1
    assert strict.stderr.startswith("error: shard s.tar, sample 'a': broken json")
    skipping = subprocess.run([*command, "--skip-bad"], capture_output=True, text=True, check=True)
    assert skipping.stdout == f"{tmp_path / 'index.json'}\n"
    assert "left out: shard s.tar, sample 'a': broken json" in skipping.stderr
    assert keys(tmp_path) == ["b"]
