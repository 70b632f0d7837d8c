# SPDX-License-Identifier: Apache-2.0
"""The stream is a function of (dataset, weights, seed, position): balanced, resumable, the same on every rank."""

import hashlib
import json
from collections import Counter

import pytest

from megatron_g2rpo.data.errors import DataError, SampleError
from megatron_g2rpo.data.shard_index import ShardIndex
from megatron_g2rpo.data.shard_writer import ShardWriter
from megatron_g2rpo.data.stream import PromptStream, number_tasks, validation_prompts
from tests.unit.data.conftest import TASK_SIZES, break_image, make_fields, make_png, write_dataset


@pytest.fixture
def make_stream(dataset, processor):
    def make(task_weights=None, seed=0, **more):
        return PromptStream(ShardIndex(dataset), task_weights or {}, seed, processor, **more)

    return make


def keys(prompts):
    return [prompt.key for prompt in prompts]


# Of weights {"vqa": 2.5}, seed 7 and a broken ocr-4, as release 0.1 drew them.
GOLDEN = """1/vqa-4 1/math-3 2/vqa-7 1/ocr-6 2/vqa-10 2/vqa-9 0/math-2 0/ocr-0 2/vqa-11 1/vqa-5 0/math-0 2/vqa-8 1/ocr-5
2/vqa-6 1/vqa-3 0/math-1 1/ocr-6 0/vqa-1 0/vqa-2 1/math-4 0/vqa-0 0/ocr-1 0/vqa-2 1/vqa-4 1/math-3 1/ocr-3 2/vqa-10
1/vqa-5 0/math-2 0/vqa-0 0/ocr-2 2/vqa-7 2/vqa-11 0/math-1 1/ocr-5 1/vqa-3 0/vqa-1 1/math-4 2/vqa-6 1/ocr-6"""


def test_one_dataset_is_drawn_from_as_ever(dataset, make_stream):
    """A run that a release began goes on with the samples that it would have drawn, replacements included."""
    break_image(dataset, "ocr", 4)
    drawn = make_stream({"vqa": 2.5}, 7, on_bad_sample="skip").next_batch(40)
    assert [key.removeprefix("shard-00000") for key in keys(drawn)] == GOLDEN.split()


def test_the_stream_does_not_depend_on_how_it_is_cut_into_batches(make_stream):
    whole = keys(make_stream().next_batch(60))
    stream = make_stream()
    assert [key for n in (1, 7, 0, 40, 12) for key in keys(stream.next_batch(n))] == whole
    assert stream.position == 60


def test_ranks_that_decode_their_own_rows_get_the_rows_of_the_global_batch(make_stream):
    whole = make_stream()
    first, second = make_stream(), make_stream()
    for _ in range(3):
        expected = keys(whole.next_batch(10))
        assert keys(first.next_batch(10, range(5))) + keys(second.next_batch(10, range(5, 10))) == expected
    assert first.state_dict() == second.state_dict() == whole.state_dict()


@pytest.mark.parametrize("position", [0, 1, 29, 250])
def test_a_saved_position_continues_the_stream(make_stream, position):
    stream = make_stream({"vqa": 2.5})
    stream.next_batch(position, indices=range(0))  # moves on without decoding
    state, expected = stream.state_dict(), keys(stream.next_batch(31))
    resumed = make_stream({"vqa": 2.5})
    resumed.next_batch(4)  # what it drew before does not matter
    resumed.load_state_dict(state)
    assert keys(resumed.next_batch(31)) == expected


def test_every_run_of_as_many_prompts_as_tasks_holds_each_task_once(make_stream):
    tasks = [prompt.task for prompt in make_stream().next_batch(60)]
    assert all(sorted(tasks[i : i + 3]) == ["math", "ocr", "vqa"] for i in range(0, 60, 3))


def test_every_prefix_holds_each_task_in_proportion_to_its_weight(make_stream):
    weights = {"math": 0.5, "ocr": 3.0}  # vqa: 1
    tasks = [prompt.task for prompt in make_stream(weights).next_batch(135)]
    counts = Counter()
    for drawn, task in enumerate(tasks, start=1):
        counts[task] += 1
        for name, weight in {**weights, "vqa": 1.0}.items():
            # The task furthest behind is drawn next, so with three tasks none is ever a whole prompt off its share.
            assert abs(counts[name] - drawn * weight / 4.5) < 1


def test_a_task_of_weight_zero_is_never_drawn(make_stream):
    assert {prompt.task for prompt in make_stream({"ocr": 0}).next_batch(50)} == {"math", "vqa"}


def test_each_epoch_of_a_task_draws_every_sample_once_in_another_order(make_stream):
    drawn = [prompt.key for prompt in make_stream().next_batch(3 * 36) if prompt.task == "vqa"]
    size = TASK_SIZES["vqa"]
    epochs = [drawn[i : i + size] for i in range(0, 36, size)]
    assert all(len(set(epoch)) == size for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_another_seed_is_another_order(make_stream):
    assert keys(make_stream(seed=1).next_batch(40)) != keys(make_stream(seed=2).next_batch(40))


@pytest.mark.parametrize(
    ("change", "named"),
    [({"seed": 1}, "another seed"), ({"task_weights": {"ocr": 2}}, "another task shares")],
)
def test_a_position_in_another_stream_is_refused(make_stream, change, named):
    with pytest.raises(DataError, match=named):
        make_stream(**change).load_state_dict(make_stream().state_dict())


def test_a_position_in_another_dataset_is_refused(make_stream, processor, tmp_path):
    other = ShardIndex(write_dataset(tmp_path / "other", {"math": 5, "ocr": 7, "vqa": 13}))
    with pytest.raises(DataError, match="another dataset fingerprint"):
        PromptStream(other, {}, 0, processor).load_state_dict(make_stream().state_dict())


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"chart": 1.0}, "task_weights names 'chart', which the data lacks; it has math, ocr, vqa"),
        ({"ocr": -1.0}, "task_weights.ocr is -1.0"),
        ({"ocr": float("nan")}, "task_weights.ocr is nan"),
        (dict.fromkeys(TASK_SIZES, 0.0), "leaves no task"),
    ],
)
def test_impossible_weights_are_an_error(make_stream, weights, message):
    with pytest.raises(DataError, match=message):
        make_stream(weights)


def test_an_undecodable_image_stops_the_stream_and_is_named(dataset, make_stream):
    break_image(dataset, "ocr", 4)
    with pytest.raises(SampleError, match=r"sample 'ocr-4': image '0\.png' is no image"):
        make_stream().next_batch(60)


def test_skip_replaces_the_bad_sample_within_its_task_counts_it_and_moves_nothing_else(dataset, make_stream, caplog):
    clean = keys(make_stream().next_batch(60))
    break_image(dataset, "ocr", 4)
    stream = make_stream(on_bad_sample="skip")
    drawn = stream.next_batch(60)
    bad = [row for row, key in enumerate(clean) if key.endswith("/ocr-4")]
    assert len(bad) >= 2
    assert stream.skipped.total() >= len(bad)  # a replacement may hit the bad sample again
    assert set(stream.skipped) == {"image"}
    (named,) = caplog.messages  # once, however often it is drawn
    assert "sample 'ocr-4'" in named
    for row, (before, now) in enumerate(zip(clean, drawn, strict=True)):
        assert now.key == before if row not in bad else (now.task == "ocr" and now.key != before)


def test_with_skip_a_rank_that_decodes_its_own_rows_gets_the_same_replacements(dataset, make_stream):
    break_image(dataset, "ocr", 4)
    whole = make_stream(on_bad_sample="skip")
    expected = keys(whole.next_batch(60))
    second_half = make_stream(on_bad_sample="skip")
    assert keys(second_half.next_batch(60, range(30, 60))) == expected[30:]
    assert 0 < second_half.skipped.total() < whole.skipped.total()


def test_a_task_with_nothing_but_bad_samples_is_an_error(tmp_path, processor):
    with ShardWriter(tmp_path) as writer:
        for n in range(3):
            writer.write(f"vqa-{n}", make_fields("vqa", n), [b"no image"])
    stream = PromptStream(ShardIndex(tmp_path), {}, 0, processor, "skip")
    with pytest.raises(
        DataError, match=r"task 'vqa': 32 samples in a row cannot be used; the last one: .*no image of a format"
    ):
        stream.next_batch(1)


def rewrite(dataset, key, change):
    """Write the shards anew with one sample's fields and images changed, as someone who repairs a dataset does."""
    index = ShardIndex(dataset)
    samples = [
        (entry.key, index.read_fields(entry), [_bytes(entry, suffix) for suffix in index.read_fields(entry)["images"]])
        for shard in index.shards
        for entry in sorted(
            (entry for task in index.tasks for entry in index.entries(task) if entry.shard == shard),
            key=lambda entry: entry.members["json"].offset,
        )
    ]
    for shard in index.shards:
        shard.unlink()
    with ShardWriter(dataset, 9) as writer:
        for name, fields, images in samples:
            fields.pop("images")
            writer.write(*(change(name, fields, images) if name == key else (name, fields, images)))


def _bytes(entry, suffix):
    member = entry.members[suffix]
    return entry.shard.read_bytes()[member.offset : member.offset + member.length]


def test_a_shard_repaired_in_place_continues_and_is_named(dataset, make_stream):
    stream = make_stream()
    stream.next_batch(11, range(0))
    state, expected = stream.state_dict(), keys(stream.next_batch(31))
    rewrite(dataset, "ocr-4", lambda key, fields, images: (key, {**fields, "answer": "repaired"}, images))
    resumed = make_stream()
    (warning,) = resumed.load_state_dict(state)
    assert "shard-000001.tar" in warning
    assert "shard-000000" not in warning
    assert keys(resumed.next_batch(31)) == expected


def test_an_untouched_dataset_continues_without_a_word(make_stream):
    assert make_stream().load_state_dict(make_stream().state_dict()) == []


@pytest.mark.parametrize(
    "change",
    [lambda key, fields, images: ("other", fields, images), lambda key, fields, images: (key, fields | TASK, images)],
    ids=["another key", "another task"],
)
def test_a_shard_with_other_samples_is_refused_and_named(dataset, make_stream, change):
    state = make_stream().state_dict()
    rewrite(dataset, "ocr-4", change)
    with pytest.raises(DataError, match=r"another dataset fingerprint .*shards with other samples: shard-000001\.tar"):
        make_stream().load_state_dict(state)


TASK = {"task": "vqa"}


def test_the_state_of_a_release_that_saved_no_shards_continues(make_stream):
    state = make_stream().state_dict()
    old = {key: state[key] for key in ("position", "seed", "task shares", "dataset fingerprint")}
    assert make_stream().load_state_dict(old) == []
    with pytest.raises(DataError, match="another dataset fingerprint"):
        make_stream().load_state_dict(old | {"dataset fingerprint": "0"})


def refuse(task, reason):
    def check(prompt):
        if prompt.task == task and prompt.key.endswith("-4"):
            raise SampleError(f"sample {prompt.key} is refused", reason)

    return check


def test_what_a_check_refuses_is_an_error_or_replaced_and_counted_by_reason(dataset, make_stream):
    clean = keys(make_stream().next_batch(60))
    checks = (refuse("math", "too_long"), refuse("vqa", "reference"))
    with pytest.raises(SampleError, match=r"sample .*-4 is refused"):
        make_stream(checks=checks).next_batch(60)
    stream = make_stream(on_bad_sample="skip", checks=checks)
    drawn = stream.next_batch(60)
    for before, now in zip(clean, keys(drawn), strict=True):
        assert (before == now) is not before.endswith(("math-4", "vqa-4"))
    assert stream.skipped.keys() == {"too_long", "reference"}
    assert all(count > 0 for count in stream.skipped.values())


def test_fewer_samples_than_a_step_needs_are_told(make_stream):
    assert make_stream().shortages(15) == []
    (line,) = make_stream().shortages(18)
    assert "a step's 18 prompts need" in line
    assert line.endswith("math has 5 for 6")


def test_validation_leaves_out_what_a_check_refuses_and_says_why(dataset, processor):
    errors = []
    prompts = validation_prompts(
        ShardIndex(dataset), 6, processor, "skip", checks=[refuse("vqa", "too_long")], on_skipped=errors.append
    )
    assert [error.reason for error in errors] == ["too_long"]
    assert "vqa-4" not in [prompt.key.split("/")[1] for prompt in prompts]
    with pytest.raises(SampleError, match="is refused"):
        validation_prompts(ShardIndex(dataset), 6, processor, checks=[refuse("vqa", "too_long")])


def test_validation_takes_the_first_of_every_task(dataset, processor):
    prompts = validation_prompts(ShardIndex(dataset), 6, processor)
    counts = Counter(prompt.task for prompt in prompts)
    assert counts == {"math": 5, "ocr": 6, "vqa": 6}
    assert [p.key.split("/")[1] for p in prompts if p.task == "vqa"] == [f"vqa-{n}" for n in range(6)]


def test_a_prompt_carries_its_task_s_place_among_the_recipe_s_sorted_tasks(dataset, processor, make_stream):
    """A task that a split lacks keeps its number, so that training and validation number alike."""
    numbers = number_tasks(["vqa", "ocr", "math", "chart"])
    assert numbers == {"chart": 0, "math": 1, "ocr": 2, "vqa": 3}
    drawn = make_stream(task_ids=numbers).next_batch(6)
    held_out = validation_prompts(ShardIndex(dataset), 1, processor, task_ids=numbers)
    for prompts in (drawn, held_out):
        assert {prompt.task for prompt in prompts} == {"math", "ocr", "vqa"}
        assert all(prompt.task_id == numbers[prompt.task] for prompt in prompts)


def test_without_a_recipe_the_data_s_own_tasks_are_numbered(dataset, processor, make_stream):
    for prompts in (make_stream().next_batch(6), validation_prompts(ShardIndex(dataset), 1, processor)):
        assert {prompt.task: prompt.task_id for prompt in prompts} == {"math": 0, "ocr": 1, "vqa": 2}


def test_validation_shared_over_ranks_is_the_whole(dataset, processor):
    index = ShardIndex(dataset)
    parts = [validation_prompts(index, 6, processor, rows=slice(rank, None, 3)) for rank in range(3)]
    assert sorted(key for part in parts for key in keys(part)) == sorted(keys(validation_prompts(index, 6, processor)))


def test_validation_on_a_bad_sample_raises_or_leaves_it_out(dataset, processor):
    break_image(dataset, "vqa", 2)
    with pytest.raises(SampleError, match="vqa-2"):
        validation_prompts(ShardIndex(dataset), 6, processor)
    prompts = validation_prompts(ShardIndex(dataset), 6, processor, on_bad_sample="skip")
    assert [p.key.split("/")[1] for p in prompts if p.task == "vqa"] == [f"vqa-{n}" for n in (0, 1, 3, 4, 5)]


@pytest.mark.parametrize(
    ("fields", "images", "reason"),
    [
        ({}, [b"no image"], "image"),
        ({}, [make_png(0, width=300, height=1)], "image"),
        ({"question": "<image> and <image>?"}, [make_png(0)], "text"),
    ],
)
def test_every_kind_of_fault_is_counted_by_its_reason(tmp_path, processor, fields, images, reason):
    with ShardWriter(tmp_path) as writer:
        writer.write("bad", make_fields("vqa", 0, **fields), images)
        writer.write("good", make_fields("vqa", 1), [])
    stream = PromptStream(ShardIndex(tmp_path), {}, 0, processor, "skip")
    assert {key.partition("/")[2] for key in keys(stream.next_batch(8))} == {"good"}
    assert set(stream.skipped) == {reason}


def test_a_field_and_contents_that_changed_in_place_are_counted_by_their_reasons(tmp_path, processor):
    for reason, old, new in (("field", b'"answer": "blue"', b'"answer": null  '), ("contents", b"thing 1", b"thing 7")):
        directory = tmp_path / reason
        with ShardWriter(directory) as writer:
            writer.write("bad", make_fields("vqa", 1), [])
            writer.write("good", make_fields("vqa", 2), [])
        (shard,) = directory.glob("*.tar")
        content = shard.read_bytes()
        assert old in content
        shard.write_bytes(content.replace(old, new, 1))
        if reason == "field":
            forget_checksums(directory)
        stream = PromptStream(ShardIndex(directory), {}, 0, processor, "skip")
        stream.next_batch(8)
        assert set(stream.skipped) == {reason}


def forget_checksums(directory):
    """Make an index describe the shards as they are, without reading a sample."""
    path = directory / "index.json"
    index = json.loads(path.read_text())
    for shard in index["shards"]:
        shard["sha256"] = hashlib.sha256((directory / shard["name"]).read_bytes()).hexdigest()
        for sample in shard["samples"]:
            sample["members"] = {suffix: place[:2] for suffix, place in sample["members"].items()}
    path.write_text(json.dumps(index))
