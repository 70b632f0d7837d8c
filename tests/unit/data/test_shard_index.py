# SPDX-License-Identifier: Apache-2.0
"""Shards are plain webdataset, any sample can be read alone, and damage is named before it does harm."""

import json
import tarfile

import numpy as np
import pytest
import webdataset
from PIL import Image

from megatron_g2rpo.data.errors import DataError, SampleError
from megatron_g2rpo.data.shard_format import INDEX_NAME, REQUIRED_FIELDS
from megatron_g2rpo.data.shard_index import ShardIndex
from megatron_g2rpo.data.shard_writer import ShardWriter, write_index
from tests.unit.data.conftest import TASK_SIZES, break_image, make_fields, make_png, write_dataset


def test_random_access_reads_what_the_webdataset_library_reads(dataset):
    index = ShardIndex(dataset)
    shards = sorted(str(path) for path in dataset.glob("*.tar"))
    assert len(shards) == 3
    library = webdataset.WebDataset(shards, shardshuffle=False, empty_check=False).decode("pil")
    expected = {sample["__key__"]: sample for sample in library}
    assert len(expected) == len(index) == sum(TASK_SIZES.values())
    for task in index.tasks:
        for entry in index.entries(task):
            sample, raw = index.read(entry), expected[entry.key]
            assert sample.key == f"{entry.shard.stem}/{entry.key}"
            fields = raw["json"]
            for name in ("task", "question", "answer", "answer_format", "response"):
                assert getattr(sample, name) == fields[name]
            assert sample.extra == {}
            assert len(sample.images) == len(fields["images"])
            for image, suffix in zip(sample.images, fields["images"], strict=True):
                np.testing.assert_array_equal(np.asarray(image), np.asarray(raw[suffix]))


def test_fields_of_the_maker_s_own_go_with_the_sample(tmp_path):
    own = {"reference_steps": "7 + 5", "sources": ["a", "b"], "difficulty": 0.5}
    with ShardWriter(tmp_path / "own") as writer:
        writer.write("math-0", make_fields("math", 0, **own), [])
    index = ShardIndex(tmp_path / "own")
    (entry,) = index.entries("math")
    assert index.read(entry).extra == own


def test_tasks_keep_the_order_of_the_shards(dataset):
    index = ShardIndex(dataset)
    assert index.tasks == ("math", "ocr", "vqa")
    for task, size in TASK_SIZES.items():
        assert [entry.key for entry in index.entries(task)] == [f"{task}-{n}" for n in range(size)]


def test_equal_samples_give_equal_bytes(tmp_path):
    one, two = (write_dataset(tmp_path / name) for name in ("one", "two"))
    assert (one / "index.json").read_bytes() == (two / "index.json").read_bytes()
    assert ShardIndex(one).fingerprint == ShardIndex(two).fingerprint


def test_a_glob_or_a_file_selects_shards_and_changes_the_fingerprint(dataset):
    whole, part = ShardIndex(dataset), ShardIndex(dataset / "shard-00000[12].tar")
    assert [shard.name for shard in part.shards] == ["shard-000001.tar", "shard-000002.tar"]
    assert len(whole) == len(part) + len(ShardIndex(dataset / "shard-000000.tar"))
    assert whole.fingerprint != part.fingerprint


def test_images_become_rgb(tmp_path):
    Image.fromarray(np.full((4, 4), 7, dtype=np.uint8)).save(tmp_path / "grey.png")
    with ShardWriter(tmp_path / "shards") as writer:
        writer.write("a", make_fields("vqa", 0), [(tmp_path / "grey.png").read_bytes()])
    index = ShardIndex(tmp_path / "shards")
    image = index.read(index.entries("vqa")[0]).images[0]
    assert image.mode == "RGB"
    assert image.getpixel((0, 0)) == (7, 7, 7)


def test_a_missing_shard_is_named(dataset):
    (dataset / "shard-000001.tar").unlink()
    with pytest.raises(DataError, match=r"shard-000001\.tar is named in index\.json but missing"):
        ShardIndex(dataset)


def test_a_truncated_shard_is_named(dataset):
    shard = dataset / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(DataError, match=r"shard-000001\.tar is truncated: \d+ bytes, the index says \d+"):
        ShardIndex(dataset)


def test_a_shard_that_the_index_does_not_know_is_named(dataset):
    (dataset / "shard-000099.tar").write_bytes((dataset / "shard-000000.tar").read_bytes())
    with pytest.raises(DataError, match=r"shard-000099\.tar is not in index\.json"):
        ShardIndex(dataset)


def test_an_exchanged_shard_of_the_same_size_is_found_by_verify(dataset):
    ShardIndex(dataset).verify()
    break_image(dataset, "vqa", 1)
    index = ShardIndex(dataset)
    with pytest.raises(DataError, match=r"shard-000000\.tar: its content is not what index\.json recorded"):
        index.verify()


def test_a_shard_truncated_while_in_use_is_an_error_not_a_bad_sample(dataset):
    index = ShardIndex(dataset)
    entry = index.entries("vqa")[-1]
    entry.shard.write_bytes(entry.shard.read_bytes()[: entry.members["json"][0] + 3])
    with pytest.raises(DataError, match=r"vqa-11.*truncated while in use") as caught:
        index.read(entry)
    assert not isinstance(caught.value, SampleError)


def test_a_directory_without_index_says_how_to_write_one(dataset):
    (dataset / "index.json").unlink()
    with pytest.raises(DataError, match=r"index\.json does not exist.*python -m megatron_g2rpo\.data\.shard_writer"):
        ShardIndex(dataset)
    write_index(dataset)
    assert len(ShardIndex(dataset)) == sum(TASK_SIZES.values())


def test_a_pattern_that_matches_nothing_is_an_error(dataset):
    with pytest.raises(DataError, match=r"no shard of .* matches .*train-"):
        ShardIndex(dataset / "train-*.tar")


def test_a_task_that_the_recipe_does_not_list_is_an_error_with_a_sample(dataset):
    ShardIndex(dataset, known_tasks=["math", "ocr", "vqa", "chart"])
    with pytest.raises(
        DataError, match=r"task 'ocr' \(first sample shard-000000/ocr-0\) is not listed under env\.tasks"
    ):
        ShardIndex(dataset, known_tasks=["math", "vqa"])


def test_an_unknown_task_lists_the_known_ones(dataset):
    with pytest.raises(DataError, match="no task 'chart'; it has math, ocr, vqa"):
        ShardIndex(dataset).entries("chart")


def test_an_undecodable_image_names_shard_sample_and_member(dataset):
    break_image(dataset, "ocr", 4)
    index = ShardIndex(dataset)
    entry = index.entries("ocr")[4]
    with pytest.raises(
        SampleError, match=rf"shard {entry.shard.name}, sample 'ocr-4': image '0\.png' cannot be decoded"
    ):
        index.read(entry)


@pytest.mark.parametrize("keep", [0, 8, 20, 60, -60])
def test_an_image_cut_at_any_place_is_undecodable(tmp_path, keep):
    with ShardWriter(tmp_path) as writer:
        writer.write("a", make_fields("vqa", 0), [make_png(0)[:keep]])
    index = ShardIndex(tmp_path)
    with pytest.raises(SampleError, match=r"shard shard-000000\.tar, sample 'a': image '0\.png'"):
        index.read(index.entries("vqa")[0])


@pytest.mark.parametrize("field", REQUIRED_FIELDS)
def test_a_missing_field_is_named_when_the_index_is_written(tmp_path, field):
    record = make_fields("vqa", 0) | {"images": []}
    del record[field]
    write_tar(tmp_path / "s.tar", {"a.json": json.dumps(record).encode()})
    with pytest.raises(SampleError, match=f"shard s.tar, sample 'a': the json lacks the field '{field}'"):
        write_index(tmp_path)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.json": b"{"}, "shard s.tar, sample 'a': broken json"),
        ({"a.json": b"\xff"}, "shard s.tar, sample 'a': broken json"),
        ({"a.json": b"[]"}, "sample 'a': the json must be an object, not list"),
        ({"a.0.png": b""}, r"sample 'a': no \.json member"),
        (
            {"a.json": json.dumps(make_fields("vqa", 0) | {"images": ["0.png"]}).encode()},
            r"sample 'a': names image '0\.png', which is not there",
        ),
    ],
)
def test_a_broken_sample_is_named_when_the_index_is_written(tmp_path, members, message):
    write_tar(tmp_path / "s.tar", members)
    with pytest.raises(SampleError, match=message):
        write_index(tmp_path)


def test_keys_must_be_unique_over_all_shards(tmp_path):
    record = json.dumps(make_fields("vqa", 0) | {"images": []}).encode()
    for shard in ("s.tar", "t.tar"):
        write_tar(tmp_path / shard, {"a.json": record})
    with pytest.raises(DataError, match="sample key 'a' occurs more than once"):
        write_index(tmp_path)


def test_a_file_that_is_no_tar_is_named(tmp_path):
    (tmp_path / "s.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(DataError, match=r"s\.tar: not a readable tar shard"):
        write_index(tmp_path)


def test_a_directory_without_shards_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"holds no \.tar shards"):
        write_index(tmp_path)


def test_a_dot_in_a_key_would_split_it_and_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"'a\.b' contains a dot"), ShardWriter(tmp_path) as writer:
        writer.write("a.b", make_fields("vqa", 0), [])


def test_shards_are_never_overwritten(dataset):
    with pytest.raises(DataError, match="already holds shards"):
        ShardWriter(dataset)


def write_tar(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            (path.parent / "member").write_bytes(data)
            tar.add(path.parent / "member", arcname=name)
    (path.parent / "member").unlink(missing_ok=True)


def test_an_index_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / INDEX_NAME).write_text("[]")
    with pytest.raises(DataError, match=f"{INDEX_NAME}: no index, but a list"):
        ShardIndex(tmp_path)

    def denied(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.read_text", denied)  # the tests may run as root, whom no file mode stops
    with pytest.raises(DataError, match=f"{INDEX_NAME} cannot be read: Permission denied"):
        ShardIndex(tmp_path)
