# SPDX-License-Identifier: Apache-2.0
"""Several datasets are drawn from as one, each in proportion to its weight and size."""

from collections import Counter

import pytest

from megatron_g2rpo.data.errors import DataError, SampleError
from megatron_g2rpo.data.mixture import Mixture
from megatron_g2rpo.data.shard_index import ShardIndex
from megatron_g2rpo.data.stream import PromptStream, validation_prompts
from tests.unit.data.conftest import break_image, write_dataset


@pytest.fixture
def parts(tmp_path):
    """Two datasets of one directory name, with the same keys in them."""
    return [
        ShardIndex(write_dataset(tmp_path / name / "train", sizes))
        for name, sizes in (("a", {"ocr": 4, "vqa": 3}), ("b", {"ocr": 8}))
    ]


def drawn(mixture, processor, n, **more):
    return PromptStream(mixture, {}, 0, processor, **more).next_batch(n)


def test_the_samples_of_datasets_with_the_same_keys_are_told_apart(parts, processor):
    keys = [prompt.key for prompt in drawn(Mixture(parts), processor, 24) if prompt.task == "ocr"]
    assert len(set(keys)) == 12
    assert Counter(key.split("/")[0] for key in keys) == {"a": 4, "b": 8}
    assert all(key.split("/")[1:3] == ["train", "shard-000000"] for key in keys)


@pytest.mark.parametrize("number", [1, 2])
def test_the_name_of_an_entry_is_the_key_of_its_sample(parts, number):
    mixture = Mixture(parts[:number])
    entries = mixture.first("ocr", 20)
    assert [mixture.name(entry) for entry in entries] == [mixture.read(entry).key for entry in entries]
    assert len({mixture.name(entry) for entry in entries}) == (4 if number == 1 else 12)


def test_without_weights_an_epoch_holds_every_sample_once(parts, processor):
    ocr = [prompt.key for prompt in drawn(Mixture(parts), processor, 48) if prompt.task == "ocr"]
    assert len(set(ocr[:12])) == len(set(ocr[12:24])) == 12


def test_a_weight_multiplies_how_often_each_sample_of_a_dataset_is_drawn(parts, processor):
    """Weights 4 and 1 on 4 and 8 samples: shares 16 and 8 of 24, in every part of the stream."""
    ocr = [p.key for p in drawn(Mixture(parts, [4.0, 1.0]), processor, 96) if p.task == "ocr"]
    assert Counter(key.split("/")[0] for key in ocr) == {"a": 32, "b": 16}
    for count in range(1, len(ocr)):
        assert abs(sum(key.startswith("a/") for key in ocr[:count]) - count * 2 / 3) < 1
    assert set(Counter(key for key in ocr if key.startswith("b/")).values()) == {2}
    assert set(Counter(key for key in ocr if key.startswith("a/")).values()) == {8}


def test_a_bad_sample_is_named_with_its_dataset_and_replaced_from_it(parts, processor):
    break_image(parts[1].directory, "ocr", 2)
    mixture = Mixture(parts, [2.0, 1.0])
    with pytest.raises(SampleError, match=r"^b/train: .*'ocr-2'"):
        drawn(mixture, processor, 48)
    clean = [entry.split("/")[0] for entry in _datasets(parts, processor)]
    replaced = drawn(mixture, processor, 48, on_bad_sample="skip")
    assert [prompt.key.split("/")[0] for prompt in replaced] == clean


def _datasets(parts, processor):
    stream = PromptStream(Mixture(parts, [2.0, 1.0]), {}, 0, processor, on_bad_sample="skip")
    return [f"{'ab'[source]}/{stream.tasks[task]}" for task, source, _ in (stream._advance() for _ in range(48))]


def test_a_position_continues_at_the_same_weights_only(parts, processor):
    stream = PromptStream(Mixture(parts, [2.0, 1.0]), {}, 0, processor)
    stream.next_batch(13, range(0))
    state, expected = stream.state_dict(), [prompt.key for prompt in stream.next_batch(20)]
    resumed = PromptStream(Mixture(parts, [2.0, 1.0]), {}, 0, processor)
    assert resumed.load_state_dict(state) == []
    assert [prompt.key for prompt in resumed.next_batch(20)] == expected
    with pytest.raises(DataError, match="another dataset weights"):
        PromptStream(Mixture(parts), {}, 0, processor).load_state_dict(state)
    with pytest.raises(DataError, match=r"another dataset fingerprint .*no longer there: 0/shard-000000\.tar"):
        PromptStream(Mixture(parts[:1]), {}, 0, processor).load_state_dict({**state, **_one(parts, processor)})


def _one(parts, processor):
    """What names no weights, so that the shards are what differs."""
    alone = PromptStream(Mixture(parts[:1]), {}, 0, processor)
    return {key: value for key, value in alone.state_dict().items() if key in ("task shares", "dataset weights")}


def test_one_dataset_is_itself(parts, processor):
    assert Mixture(parts[:1]).fingerprint == parts[0].fingerprint
    assert Mixture(parts).fingerprint not in {part.fingerprint for part in parts}


def test_validation_takes_the_first_of_each_dataset_in_turn(parts, processor):
    prompts = validation_prompts(Mixture(parts), 3, processor)
    assert [prompt.key.replace("/train/shard-000000", "") for prompt in prompts if prompt.task == "ocr"] == [
        "a/ocr-0", "b/ocr-0", "a/ocr-1",
    ]  # fmt: skip


def test_a_shard_that_is_named_twice_is_refused(parts):
    again = ShardIndex(parts[0].directory / "shard-*.tar")
    with pytest.raises(DataError, match="is named twice"):
        Mixture([*parts, again])
