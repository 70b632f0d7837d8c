# SPDX-License-Identifier: Apache-2.0
"""Claims: `megatron-g2rpo eval` says what the training loop's own validation says, for any number of processes, goes on
where it was interrupted, and names what it cannot use."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from megatron_g2rpo.data.shard_index import ShardIndex
from megatron_g2rpo.rollout.transformers.engine import TransformersEngine
from megatron_g2rpo.types import Prompt, Rollout
from tests.e2e.toy import ON_DEVICE, ROOT, TASKS, Toy, break_image, call, error_of, metrics, succeed, write_shards

# Several batches for 36 prompts.
SMALL_BATCHES = "policy.generation.batch_size=4"


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def evaluate(*arguments: str | Path) -> str:
    result = call("eval", *arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def recipe(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.recipe(tmp_path_factory.mktemp("eval") / "recipe.yaml")


@pytest.fixture(scope="module")
def evaluated(recipe: Path) -> Path:
    """Greedy answers to all 36 held-out prompts."""
    out = recipe.parent / "whole"
    evaluate(recipe, SMALL_BATCHES, "--out", out)
    return out


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The keys of the prompts that an engine is asked."""
    keys: list[str] = []
    generate = TransformersEngine.generate

    def noted(self: TransformersEngine, prompts: Sequence[Prompt], *args: Any, **keywords: Any) -> list[Rollout]:
        keys.extend(prompt.key for prompt in prompts)
        return generate(self, prompts, *args, **keywords)

    monkeypatch.setattr(TransformersEngine, "generate", noted)
    return keys


def test_an_evaluation_says_what_the_loops_greedy_validation_says(
    toy: Toy, recipe: Path, straight: Path, tmp_path: Path
) -> None:
    """Of the policy that a run started with, and of the one that it exported, on the run's validation prompts."""
    validated = metrics(straight)
    for step, model in ((0, toy.model), (max(validated), straight / "hf")):
        out = tmp_path / str(step)
        evaluate(recipe, "--model", model, "--limit", "4", "--out", out)
        summary = json.loads((out / "summary.json").read_text())
        line = validated[step]
        for name in ("accuracy", "format", "reward", "response_tokens", "truncated"):
            for task in TASKS:
                assert summary["tasks"][task]["prompts"] == 4
                # Sums of four numbers in another order.
                mean = summary["tasks"][task][name]["mean"]
                assert mean == pytest.approx(line[f"val/{task}/greedy_{name}"], abs=1e-12), (step, task, name)
            assert summary["mean_over_tasks"][name]["mean"] == pytest.approx(line[f"val/mean_greedy_{name}"], abs=1e-12)
    accuracies = [validated[step][f"val/{task}/greedy_accuracy"] for step in (0, max(validated)) for task in TASKS]
    assert len(set(accuracies)) > 1, "figures that are all alike prove little"


def test_two_processes_write_the_file_of_one(recipe: Path, evaluated: Path, tmp_path: Path) -> None:
    shown = succeed("eval", recipe, SMALL_BATCHES, "--out", tmp_path / "two", nproc=2)
    assert "mean over tasks" in shown
    for name in ("answers.jsonl", "unusable.jsonl", "summary.json"):
        assert (tmp_path / "two" / name).read_text() == (evaluated / name).read_text(), name


def test_every_answer_is_on_file(evaluated: Path) -> None:
    lines = read(evaluated / "answers.jsonl")
    assert len({line["key"] for line in lines}) == len(lines) == 36
    assert [line["task"] for line in lines] == [task for task in sorted(TASKS) for _ in range(12)]
    for line in lines:
        assert line["parts"].keys() == {"accuracy", "format", "operands", "length"}
        assert (line["answer"] is None) or line["answer"] in line["text"]
        assert line["question"]
        assert line["reference"]
    assert any(line["parts"]["accuracy"] == 1.0 for line in lines)


def test_an_interrupted_evaluation_asks_what_is_left_alone(
    recipe: Path, evaluated: Path, tmp_path: Path, asked: list[str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(evaluated, out)
    whole = (out / "answers.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    (out / "answers.jsonl").write_bytes(b"".join(lines[:20]) + lines[20][:30])
    (out / "summary.json").unlink()
    evaluate(recipe, "policy.generation.batch_size=3", "--out", out)
    assert asked == [json.loads(line)["key"] for line in lines[20:]]
    assert (out / "answers.jsonl").read_bytes() == whole
    assert (out / "summary.json").read_text() == (evaluated / "summary.json").read_text()
    asked.clear()
    evaluate(recipe, "--out", out, "--compare", evaluated)  # complete: no engine is asked
    assert asked == []
    comparison = json.loads((out / "comparison.json").read_text())
    assert comparison["accuracy"]["mean_over_tasks"]["difference"]["mean"] == 0.0
    assert comparison["accuracy"]["mean_over_samples"]["n"] == 36


def test_another_evaluation_is_refused_by_what_differs(recipe: Path, evaluated: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(evaluated, out)
    error = error_of("eval", recipe, "--out", out, "--samples", "3", "--temperature", "0.5")
    assert "sampling.samples: 1 there, 3 here; sampling.temperature: 0.0 there, 0.5 here" in error
    assert "--fresh" in error


def test_a_model_and_a_dataset_need_no_recipe(toy: Toy, tmp_path: Path) -> None:
    """Several samples, some tasks with a threshold of their own."""
    # The vocabulary was learned from the questions alone; the exemplar's prompts have an instruction.
    keys = ("data.format_instruction=false", "policy.generation.max_new_tokens=32", *ON_DEVICE)
    out = tmp_path / "out"
    options = ("--samples", "3", "--temperature", "1", "--limit", "3", "--pass-threshold", "pair=0.5", "--out", out)
    shown = evaluate("--model", toy.model, "--data", toy.data / "val", *options, *keys)
    lines = read(out / "answers.jsonl")
    assert [line["sample_index"] for line in lines] == [0, 1, 2] * 9
    assert len({line["text"] for line in lines}) > 9, "samples of a prompt should differ"
    summary = json.loads((out / "summary.json").read_text())
    for task in TASKS:
        figures = summary["tasks"][task]
        assert figures["pass@1"]["mean"] <= figures["pass@2"]["mean"] <= figures["pass@3"]["mean"]
        assert figures["pass_threshold"] == (0.5 if task == "pair" else 1.0)
    assert "pass@3" in shown
    assert json.loads((out / "evaluation.json").read_text())["identity"]["policy.precision"] == "float32"


def test_samples_that_cannot_be_asked_are_counted_and_listed(toy: Toy, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(toy.data, data)
    broken = break_image(data / "val", "colour", 1)
    recipe = Toy(data, toy.model).recipe(tmp_path / "recipe.yaml")
    out = tmp_path / "out"
    # A pair of images is longer than what is left for a prompt; one image is not.
    shown = evaluate(recipe, "--limit", "2", "--out", out, "policy.max_total_sequence_length=64")
    listed = read(out / "unusable.jsonl")
    assert [(line["task"], line["reason"]) for line in listed] == [
        ("colour", "image"),
        ("pair", "too_long"),
        ("pair", "too_long"),
    ]
    assert broken in listed[0]["message"]
    assert "samples that could not be asked or scored: 1 image, 2 too_long (colour 1, pair 2)" in shown
    summary = json.loads((out / "summary.json").read_text())
    assert {task: figures["prompts"] for task, figures in summary["tasks"].items()} == {"colour": 1, "sum": 2}
    assert summary["unusable"] == {"colour": {"image": 1}, "pair": {"too_long": 2}}


def test_unreadable_references_and_failed_rewards_are_listed_and_too_many_of_these_end_it(
    toy: Toy, tmp_path: Path, asked: list[str]
) -> None:
    """Of two datasets, whose samples have the same names, one has references that are no numbers."""
    part = tmp_path / "unlucky.py"
    part.write_text(
        "from megatron_g2rpo.extend import reward_part\n\n\n"
        "@reward_part('unlucky')\n"
        "def unlucky(sample, response):\n"
        "    if sample.key.endswith(('/colour-16', '/pair-17')):\n"
        "        raise OSError('the judge is away')\n"
        "    return 0.0\n"
    )
    other = write_shards(tmp_path / "other", 1, first=200, answer="many", answer_format="numeric")
    recipe = toy.recipe(
        tmp_path / "recipe.yaml",
        imports=[str(ROOT / "examples" / "quickstart" / "rewards.py"), str(part)],
        data={"validation": {"path": [str(toy.data / "val"), str(other)]}},
        env={"reward_weights": {"unlucky": 1.0}, "reward_workers": 1},
    )
    out = tmp_path / "out"
    options = ("--samples", "2", "--limit", "4", "--out", out, SMALL_BATCHES)  # 12 prompts, 24 responses
    ended = call("eval", recipe, *options, "env.max_failed_rewards=0.1")
    error = ended.stderr
    assert ended.exit_code == 1
    assert "2 of 24 rewards failed before, and now: " in error
    assert "more than env.max_failed_rewards allows" in error
    assert "OSError: the judge is away" in error
    known = {line["key"] for name in ("answers", "unusable") for line in read(out / f"{name}.jsonl")}
    assert 0 < len(known) < 12, "what was done before is on file"
    asked.clear()
    shown = evaluate(recipe, *options, "env.max_failed_rewards=0.2")
    assert known.isdisjoint(asked)
    listed = {(line["key"], line["reason"]) for line in read(out / "unusable.jsonl")}
    assert {reason for _, reason in listed} == {"reference", "reward"}
    assert {key.split("/")[0] for key, reason in listed if reason == "reference"} == {"other"}
    assert {key for key, reason in listed if reason == "reward"} == {
        f"val/{ShardIndex(toy.data / 'val').entries(task)[place].name}" for task, place in (("colour", 0), ("pair", 1))
    }
    assert "samples that could not be asked or scored: 3 reference, 2 reward (colour 2, pair 2, sum 1)" in shown
    answers = [line["key"] for line in read(out / "answers.jsonl")]
    assert len(answers) == 2 * (12 - 5)
    asked.clear()
    evaluate(recipe, *options, "env.max_failed_rewards=0.2")
    assert asked == []


def test_a_recipe_of_many_gpus_is_evaluated_by_one_process(recipe: Path, evaluated: Path, tmp_path: Path) -> None:
    layout = ("policy.megatron_cfg.tensor_model_parallel_size=4", "cluster.num_nodes=8")
    evaluate(recipe, *layout, "--limit", "1", "--out", tmp_path)
    first = {line["task"]: line for line in reversed(read(evaluated / "answers.jsonl"))}
    assert read(tmp_path / "answers.jsonl") == [first[task] for task in sorted(TASKS)]


def test_requests_that_cannot_be_meant_are_refused(recipe: Path, tmp_path: Path) -> None:
    assert error_of("eval", "--model", "m") == (
        "name a recipe to evaluate, or both a model and a dataset: --model HF_DIR --data DATA"
    )
    assert "greedy responses to a prompt are all the same" in error_of(
        "eval", recipe, "--samples", "2", "--temperature", "0"
    )
    assert "convert export" in error_of("eval", recipe, "policy.pretrained_checkpoint=runs/x/step_1")
    assert "name a model with --model" in error_of("eval", recipe, "policy.init=random")
    missing = error_of("eval", recipe, "--compare", tmp_path / "none", "--out", tmp_path / "out")
    assert "name the directory of an evaluation" in missing
    (tmp_path / "file").write_text("mine")
    assert "holds files, but no evaluation.json" in error_of("eval", recipe, "--out", tmp_path)
