# SPDX-License-Identifier: Apache-2.0
"""Claim: what a user can mend ends the run at once, with exit code 1 and one message that says what and where."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_g2rpo.commands import launch
from megatron_g2rpo.data.processing import ChatProcessor
from megatron_g2rpo.data.shard_index import ShardIndex
from megatron_g2rpo.data.shard_writer import ShardWriter
from megatron_g2rpo.data.stream import PromptStream
from tests.e2e.runs import checkpoints
from tests.e2e.toy import TASKS, Toy, break_image, call, command, error_of, metrics, only_error, sample, write_shards

TENSOR_PARALLEL = "policy.megatron_cfg.tensor_model_parallel_size"
PIPELINE_PARALLEL = "policy.megatron_cfg.pipeline_model_parallel_size"
# One step and nothing around it.
BARE = ("grpo.max_num_steps=1", "grpo.val_at_start=false", "grpo.val_at_end=false", "checkpointing.export_hf=false")


@pytest.fixture
def own(toy: Toy, tmp_path: Path) -> Toy:
    """Data that a test may damage, with the shared policy."""
    shutil.copytree(toy.data, tmp_path / "data")
    return Toy(tmp_path / "data", toy.model)


def recipe_of(toy: Toy, tmp_path: Path, **changes: object) -> Path:
    return toy.recipe(tmp_path / "recipe.yaml", logger={"log_dir": str(tmp_path / "run")}, **changes)


def test_an_unknown_key_is_named_with_its_nearest(toy: Toy, tmp_path: Path) -> None:
    result = call("train", recipe_of(toy, tmp_path), "grpo.num_promts_per_step=8")
    assert result.exit_code == 1
    assert result.stdout == ""
    message = only_error(result.stderr)
    assert "unknown key 'grpo.num_promts_per_step'" in message
    assert "nearest valid key: grpo.num_prompts_per_step" in message
    assert not (tmp_path / "run").exists()


def test_a_missing_shard_is_named_and_mending_the_path_is_enough(own: Toy, tmp_path: Path) -> None:
    (own.data / "train" / "shard-000001.tar").unlink()
    recipe = recipe_of(own, tmp_path)
    assert "shard-000001.tar" in error_of("train", recipe)
    # The attempt left its recipe in the run directory, but no result: another recipe may have it.
    write_shards(tmp_path / "whole", 4)
    result = call("train", recipe, *BARE, f"data.train.path={tmp_path / 'whole'}")
    assert result.exit_code == 0, result.output


def test_an_undecodable_image_is_named_or_skipped_and_counted(own: Toy, tmp_path: Path) -> None:
    recipe = recipe_of(own, tmp_path)
    broken = [break_image(own.data / "train", "colour", number) for number in range(0, 16, 2)]
    message = error_of("train", recipe, *BARE)
    assert message.startswith(tuple(broken)), message
    assert "data.on_bad_sample=skip" in message

    result = call("train", recipe, *BARE, "grpo.max_num_steps=2", "data.on_bad_sample=skip", "grpo.seed=1")
    assert result.exit_code == 0, result.output
    lines = metrics(tmp_path / "run")
    assert lines[1]["train/skipped_samples"] + lines[2]["train/skipped_samples"] > 0
    assert lines[2]["train/num_tokens"] > 0


def test_a_reference_that_cannot_be_read_is_named_before_anything_is_sampled(own: Toy, tmp_path: Path) -> None:
    shutil.rmtree(own.data / "train")
    write_shards(own.data / "train", 4, answer_format="numeric", answer="many")
    message = error_of("train", recipe_of(own, tmp_path), *BARE)
    assert message.startswith("sample shard-000000/")
    assert "the reference 'many' cannot be read under answer format 'numeric'" in message
    assert "data.on_bad_sample=skip" in message


def mended(toy: Toy, broken: list[int]) -> None:
    """Write the training shards anew, whole but for the answers of some samples of the task ``sum``."""
    shutil.rmtree(toy.data / "train")
    with ShardWriter(toy.data / "train", samples_per_shard=9) as writer:
        for number in range(4):
            for task in TASKS:
                fields, images = sample(task, number)
                if task == "sum" and number in broken:
                    fields["answer"] = "many"
                writer.write(f"{task}-{number}", fields, images)


def test_a_run_that_a_bad_sample_has_stopped_goes_on_by_every_remedy_that_is_named(own: Toy, tmp_path: Path) -> None:
    """Steps 1 and 2 draw a whole epoch: step 1 is saved, and step 2 meets the bad sample."""
    drawn = (*BARE, "grpo.dynamic_sampling.enabled=false", "checkpointing.save_period=1")
    recipe, run = recipe_of(own, tmp_path), tmp_path / "run"
    mended(own, [])
    stream = PromptStream(ShardIndex(own.data / "train"), {}, 42, ChatProcessor(own.model))
    first = {prompt.key.split("/")[1] for prompt in stream.next_batch(6)}
    (late,) = sorted(number for number in range(4) if f"sum-{number}" not in first)[:1]
    mended(own, [late])
    assert call("train", recipe, *drawn).exit_code == 0
    two = (*drawn, "grpo.max_num_steps=2")
    message = error_of("train", recipe, *two)
    assert f"/sum-{late}," in message

    shutil.copytree(run, tmp_path / "stopped")
    result = call("train", recipe, *two, "data.on_bad_sample=skip")
    assert result.exit_code == 0, result.output
    assert "the run goes on with other settings (data.on_bad_sample: error before, skip now" in result.output
    lines = metrics(run)
    assert lines[2]["train/skipped_samples"] == lines[2]["train/skipped/reference"] >= 1

    shutil.rmtree(run)
    shutil.copytree(tmp_path / "stopped", run)
    mended(own, [])
    result = call("train", recipe, *two)
    assert result.exit_code == 0, result.output
    assert "the data changed since the checkpoint, in place: the run goes on with the samples of shard-00000" in (
        result.output
    )
    assert metrics(run)[2]["train/skipped_samples"] == 0

    shutil.rmtree(run)
    shutil.copytree(tmp_path / "stopped", run)
    shutil.copytree(own.data / "train", tmp_path / "elsewhere")
    moved = f"data.train.path={tmp_path / 'elsewhere'}"
    tight = error_of("train", recipe, *two, moved, "policy.max_total_sequence_length=40")
    assert "raise policy.max_total_sequence_length" in tight
    result = call("train", recipe, *two, moved, "policy.max_total_sequence_length=256")
    assert result.exit_code == 0, result.output


def test_held_out_samples_that_cannot_be_used_are_named_or_counted(own: Toy, tmp_path: Path) -> None:
    broken = [break_image(own.data / "val", "colour", number) for number in range(2)]
    one = ("grpo.max_num_steps=1", "grpo.val_at_end=false", "checkpointing.export_hf=false")
    assert error_of("train", recipe_of(own, tmp_path), *one).startswith(tuple(broken))
    result = call("train", recipe_of(own, tmp_path), *one, "data.on_bad_sample=skip")
    assert result.exit_code == 0, result.output
    assert metrics(tmp_path / "run")[0]["val/skipped/image"] == 2.0

    shutil.rmtree(own.data / "val")
    write_shards(own.data / "val", 2, answer_format="numeric", answer="many")
    message = error_of("train", recipe_of(own, tmp_path), *one, "data.on_bad_sample=skip", "--fresh")
    assert message.startswith("data.validation: no held-out sample can be used; the first: sample shard-000000/")


def test_an_error_at_the_start_ends_the_reward_workers_without_another_word(own: Toy, tmp_path: Path) -> None:
    broken = break_image(own.data / "val", "colour", 0)
    run = command("train", recipe_of(own, tmp_path), *BARE, "env.reward_workers=1")
    assert run.returncode == 1
    (line,) = run.stderr.splitlines()
    assert line.startswith(f"error: {broken}")


def test_a_weight_of_a_task_without_samples_is_found_at_the_start(own: Toy, tmp_path: Path) -> None:
    weights = ("env.tasks.more={}", "data.task_weights={more: 1}")
    message = error_of("train", recipe_of(own, tmp_path), "--dry-run", *weights)
    assert "data.task_weights: data.task_weights names 'more', which the data lacks" in message


def test_without_validation_data_and_with_several_training_sets_a_run_runs(own: Toy, tmp_path: Path) -> None:
    write_shards(tmp_path / "more", 2)
    shutil.rmtree(own.data / "val")
    listed = f"data.train.path=[{own.data / 'train'}, {{path: {tmp_path / 'more'}, weight: 2}}]"
    result = call("train", recipe_of(own, tmp_path), *BARE, "data.validation=null", listed)
    assert result.exit_code == 0, result.output
    assert list(metrics(tmp_path / "run")) == [1]


@pytest.mark.parametrize(
    ("key", "size", "why"),
    [
        (TENSOR_PARALLEL, 3, f"{TENSOR_PARALLEL}=3 does not divide the model's 4 attention heads"),
        (PIPELINE_PARALLEL, 3, f"{PIPELINE_PARALLEL}=3: 4 layers do not divide over 3 stages"),
    ],
    ids=["heads", "layers"],
)
def test_a_layout_that_the_model_cannot_be_split_into_starts_no_process(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, size: int, why: str
) -> None:
    monkeypatch.setattr(launch, "launch", lambda *_: pytest.fail("processes were started"))
    recipe = recipe_of(toy, tmp_path)
    assert f"override '{key}={size}': {why}" in error_of("train", recipe, "--nproc", size, f"{key}={size}")
    arguments = ("--model", toy.model, "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out.jsonl")
    assert error_of("logprobs", *arguments, "--nproc", size, f"{key}={size}").startswith(why)
    assert not (tmp_path / "run").exists()
    # Without processes to spread it over, the recipe itself is at fault.
    assert key in error_of("train", recipe, f"{key}={size}")


def test_a_model_that_is_not_there_is_named(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    nowhere = tmp_path / "nowhere"
    assert f"policy.model_name: {nowhere}" in error_of("train", recipe_of(Toy(toy.data, nowhere), tmp_path))


@pytest.mark.parametrize("how", [["--dry-run"], ["--nproc", "2"]], ids=["dry run", "two processes"])
def test_everything_that_is_wrong_is_named_at_once(
    own: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: list[str]
) -> None:
    """A wrong model, dataset, answer format and backend: four faults, one look, no process."""
    monkeypatch.setattr(launch, "launch", lambda *_: pytest.fail("processes were started"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    nowhere = tmp_path / "nowhere"
    wrong = [
        f"policy.model_name={nowhere}",
        f"data.train.path={tmp_path / 'no_data'}",
        "env.tasks.sum.answer_format=numericc",
        "policy.generation.backend=vlm",
    ]
    message = error_of("train", recipe_of(own, tmp_path), *how, *wrong)
    assert f"override 'policy.model_name={nowhere}': policy.model_name: {nowhere} is neither" in message
    assert f"data.train.path: {tmp_path / 'no_data'} does not exist" in message
    assert "unknown answer format 'numericc' (did you mean 'numeric'?)" in message
    assert "unknown rollout engine 'vlm' (did you mean 'vllm'?)" in message
    assert not (tmp_path / "run").exists()


def test_an_answer_format_of_the_data_that_nobody_registered_is_found_at_the_start(own: Toy, tmp_path: Path) -> None:
    shutil.rmtree(own.data / "val")
    write_shards(own.data / "val", 4, answer_format="exakt")
    message = error_of("train", recipe_of(own, tmp_path), "--dry-run")
    assert "data.validation.path: " in message
    assert "samples of task 'colour': unknown answer format 'exakt' (did you mean 'exact'?)" in message
    # Where the recipe names the format, what samples say does not count.
    named = [f"env.tasks.{task}.answer_format=exact" for task in ("colour", "pair", "sum")]
    assert call("train", recipe_of(own, tmp_path), "--dry-run", *named).exit_code == 0


def test_a_run_directory_of_another_recipe_is_refused_or_moved_aside(toy: Toy, tmp_path: Path) -> None:
    recipe, run = recipe_of(toy, tmp_path), tmp_path / "run"
    assert call("train", recipe, *BARE).exit_code == 0
    before = (run / "metrics.jsonl").read_text()

    message = error_of("train", recipe, *BARE, "grpo.seed=7")
    assert f"{run} belongs to another recipe (grpo.seed: 42 there, 7 here)" in message
    assert "--fresh" in message
    assert (run / "metrics.jsonl").read_text() == before

    result = call("train", recipe, *BARE, "grpo.seed=7", "--fresh")
    assert result.exit_code == 0, result.output
    (aside,) = (path for path in tmp_path.iterdir() if path.name.startswith("run."))
    assert (aside / "metrics.jsonl").read_text() == before
    assert list(metrics(run)) == [1]
    assert (run / "metrics.jsonl").read_text() != before


def test_a_rank_that_fails_takes_the_job_down_with_its_own_message(own: Toy, tmp_path: Path) -> None:
    index = ShardIndex(own.data / "train")
    # Row 1 of the first global batch: of two data-parallel ranks the second alone reads it.
    (prompt,) = PromptStream(index, {}, 42, ChatProcessor(own.model)).next_batch(6, range(1, 2))
    number = [entry.name for entry in index.entries(prompt.task)].index(prompt.key)
    broken = break_image(own.data / "train", prompt.task, number)
    # The gloo timeout is half an hour, that of this command four minutes.
    done = command("train", recipe_of(own, tmp_path), *BARE, "--nproc", "2")
    assert done.returncode == 1
    message = only_error(done.stderr)
    assert message.startswith(f"rank 1: {broken}"), message
    assert checkpoints(tmp_path / "run") == []
