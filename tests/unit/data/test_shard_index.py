# SPDX-License-Identifier: Apache-2.0
"""Shards are plain webdataset, any sample can be read alone, and damage is named before it does harm."""

import json

import numpy as np
import pytest
import webdataset
from PIL import Image

from megatron_g2rpo.data import shard_index
from megatron_g2rpo.data.errors import DataError, SampleError
from megatron_g2rpo.data.shard_format import INDEX_NAME, sha256_of
from megatron_g2rpo.data.shard_index import ShardIndex
from megatron_g2rpo.data.shard_writer import ShardWriter, write_index
from tests.unit.data.conftest import TASK_SIZES, break_image, make_fields, make_png, overwrite, write_dataset


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
    index = ShardIndex(dataset)
    index.verify()
    overwrite(index.entries("vqa")[1])
    with pytest.raises(DataError, match=r"shard-000000\.tar: its content is not what index\.json recorded; restore it"):
        index.verify()


def test_content_changed_in_place_is_found_by_who_reads_it_and_by_nobody_else(dataset):
    index = ShardIndex(dataset)
    entry, *others = index.entries("ocr")
    place = entry.members["json"]
    data = bytearray(entry.shard.read_bytes())
    start = data.index(b'"answer": "black"', place.offset) + len('"answer": "')
    data[start : start + 5] = b"green"
    entry.shard.write_bytes(data)
    with pytest.raises(
        SampleError, match=r"shard shard-000000\.tar, sample 'ocr-0': 'json' is not what index\.json recorded; restore"
    ) as caught:
        index.read(entry)
    assert f"build the index again with: python -m megatron_g2rpo.data.shard_writer {dataset}" in str(caught.value)
    for other in others:
        index.read(other)
    overwrite(others[0])
    with pytest.raises(SampleError, match=r"sample 'ocr-1': '0\.png' is not what index\.json recorded"):
        index.read(others[0])
    write_index(dataset)
    again = ShardIndex(dataset)
    assert again.read(again.entries("ocr")[0]).answer == "green"


def test_an_index_of_version_1_is_read_and_a_shard_is_verified_whole_once(dataset, monkeypatch):
    as_version_1(dataset)
    index = ShardIndex(dataset)
    verified = []
    monkeypatch.setattr(shard_index, "sha256_of", lambda path: verified.append(path.name) or sha256_of(path))
    for task in index.tasks:
        for entry in index.entries(task):
            assert len(list(index.read(entry).images)) == len(entry.members) - 1
    assert sorted(verified) == ["shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
    overwrite(index.entries("vqa")[-1])
    with pytest.raises(DataError, match=r"shard-000002\.tar: its content is not what index\.json recorded"):
        ShardIndex(dataset).read(index.entries("vqa")[-1])


def as_version_1(directory):
    path = directory / INDEX_NAME
    content = json.loads(path.read_text())
    for record in content["shards"]:
        for sample in record["samples"]:
            sample["members"] = {suffix: place[:2] for suffix, place in sample["members"].items()}
    path.write_text(json.dumps({**content, "version": 1}))


def test_the_index_s_version_changes_no_fingerprint(dataset):
    fingerprint = ShardIndex(dataset).fingerprint
    as_version_1(dataset)
    assert ShardIndex(dataset).fingerprint == fingerprint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"version": 1}', "lacks the list of shards"),
        ('{"version": 1, "shards": {}}', "lacks the list of shards"),
        ('{"version": 1, "shards": [1]}', r"not what this program writes \(TypeError"),
        ('{"version": 1, "shards": [{}]}', r"not what this program writes \(KeyError: 'name'\)"),
        ('{"version": 3, "shards": []}', "version 3, this program reads 1 and 2"),
        ("[]", "no index, but a list"),
        ("{", "broken json"),
        ("[" * 100_000, "broken json"),
        ("\x00", "broken json"),
    ],
)
def test_a_broken_index_says_how_to_build_it_again(dataset, content, message):
    (dataset / INDEX_NAME).write_text(content)
    with pytest.raises(DataError, match=rf"index\.json: {message}.*build it again with: python -m megatron_g2rpo"):
        ShardIndex(dataset)


def test_a_record_that_lacks_its_samples_is_a_broken_index(dataset):
    content = json.loads((dataset / INDEX_NAME).read_text())
    del content["shards"][1]["samples"]
    (dataset / INDEX_NAME).write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"not what this program writes \(KeyError: 'samples'\); build it again"):
        ShardIndex(dataset)


def test_a_path_that_is_no_dataset_says_what_to_do(tmp_path):
    (tmp_path / "train.jsonl").write_text("{}")
    with pytest.raises(
        DataError, match=r"train\.jsonl is no \.tar shard; make shards .* data import .*train\.jsonl OUT"
    ):
        ShardIndex(tmp_path / "train.jsonl")
    with pytest.raises(DataError, match=r"holds no \.tar shards; make some of it with: megatron-g2rpo data import"):
        ShardIndex(tmp_path)
    for name in ("trian", "trian/*.tar", "x.tar"):
        with pytest.raises(DataError, match=r"does not exist; .*name a directory of shards"):
            ShardIndex(tmp_path / name)


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
    with pytest.raises(DataError, match=r"task 'ocr' \(.*\), task 'vqa' \(.*\) are not listed .* add them there"):
        ShardIndex(dataset, known_tasks=["math"])


def test_an_unknown_task_lists_the_known_ones(dataset):
    with pytest.raises(DataError, match="no task 'chart'; it has math, ocr, vqa"):
        ShardIndex(dataset).entries("chart")


def test_an_undecodable_image_names_shard_sample_and_member(dataset):
    break_image(dataset, "ocr", 4)
    index = ShardIndex(dataset)
    entry = index.entries("ocr")[4]
    images = index.read(entry).images
    with pytest.raises(SampleError, match=rf"shard {entry.shard.name}, sample 'ocr-4': image '0\.png' is no image"):
        list(images)


@pytest.mark.parametrize("keep", [0, 8, 20, 60, -60])
def test_an_image_cut_at_any_place_is_undecodable(tmp_path, keep):
    with ShardWriter(tmp_path) as writer:
        writer.write("a", make_fields("vqa", 0), [make_png(0)[:keep]])
    index = ShardIndex(tmp_path)
    with pytest.raises(SampleError, match=r"shard shard-000000\.tar, sample 'a': image '0\.png'"):
        list(index.read(index.entries("vqa")[0]).images)


def test_a_directory_without_shards_is_an_error(tmp_path):
    with pytest.raises(DataError, match=r"holds no \.tar shards"):
        write_index(tmp_path)


def test_a_dot_in_a_key_would_split_it_and_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"'a\.b' contains a dot"), ShardWriter(tmp_path) as writer:
        writer.write("a.b", make_fields("vqa", 0), [])


def test_shards_are_never_overwritten(dataset):
    with pytest.raises(DataError, match="already holds shards"):
        ShardWriter(dataset)


def test_an_index_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / INDEX_NAME).write_text("[]")
    with pytest.raises(DataError, match=f"{INDEX_NAME}: no index, but a list"):
        ShardIndex(tmp_path)

    def denied(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr("pathlib.Path.read_text", denied)  # the tests may run as root, whom no file mode stops
    with pytest.raises(DataError, match=f"{INDEX_NAME} cannot be read: Permission denied"):
        ShardIndex(tmp_path)
