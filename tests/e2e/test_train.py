# SPDX-License-Identifier: Apache-2.0
"""Claims: a run leaves what it promises, resumes bit for bit, and does not depend on its layout."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from megatron_g2rpo import recipe as recipes
from megatron_g2rpo.data.processing import ChatProcessor
from megatron_g2rpo.recipe.validation_metrics import validation_metrics
from megatron_g2rpo.rollout.base import Sampling
from megatron_g2rpo.train.assembly import assemble
from megatron_g2rpo.train.g2rpo import g2rpo_step
from megatron_g2rpo.train.run.loop import Run
from megatron_g2rpo.train.step.losses import G2RPOLoss, TaskEntropies, entropy_bounds
from megatron_g2rpo.types import PackedBatch
from megatron_g2rpo.weights.manifest import read_manifest
from tests.common.tiny_model import hf_greedy
from tests.e2e.runs import (
    BARE,
    DISTRIBUTED,
    FIVE_DIGITS,
    LAYOUTS_OF_TWO,
    TENSOR_PARALLEL,
    assert_same_step,
    checkpoints,
)
from tests.e2e.toy import ROOT, TASKS, Toy, call, metrics, numbers, succeed


def test_a_run_leaves_its_metrics_recipe_events_and_checkpoint(toy: Toy, straight: Path) -> None:
    lines = metrics(straight)
    assert list(lines) == [0, 1, 2, 3, 4]
    names = [f"val/{task}/{kind}" for task in TASKS for kind in ("reward", "greedy_reward")]
    names += ["val/mean_reward", "val/mean_greedy_reward"]
    for step, line in lines.items():
        assert (names[0] in line) == (step in (0, 4))
    for step in (0, 4):
        assert all(0.0 <= lines[step][name] <= 1.2 for name in names)
        assert lines[step]["val/mean_reward"] == pytest.approx(
            sum(lines[step][f"val/{task}/reward"] for task in TASKS) / len(TASKS), rel=1e-12
        )
    for step in range(1, 5):
        # The engine computes what the trainer computes: fp32 noise over a few layers.
        assert lines[step]["train/rollout_gap_max"] < 1e-4
        # One update a step: the policy is the one that sampled.
        assert lines[step]["train/ratio"] == 1.0
        assert lines[step]["train/kl"] == 0.0
        assert lines[step]["train/importance_masked"] == lines[step]["train/importance_truncated"] == 0.0
        shares = [lines[step][name] for name in lines[step] if name.endswith("/gradient_share")]
        assert bool(shares) == (step % 2 == 0), "task_gradient_period 2"
        assert not shares or sum(shares) == pytest.approx(1.0, rel=1e-12)
    # Nothing has been learned before the first update: the policy is the reference.
    assert lines[1]["train/reference_kl"] == 0.0 < lines[2]["train/reference_kl"]
    assert lines[1]["train/sampling/groups_drawn"] > 6, "some groups should have been replaced"
    assert lines[1]["train/zero_variance_groups"] < 1.0, "the comparisons of this file need advantages"

    again = recipes.load(straight / "recipe.yaml", [], "train")
    assert again.logger.log_dir == str(straight)
    assert again.policy.model_name == str(toy.model)

    events = EventAccumulator(str(straight / "tensorboard")).Reload()
    logged = {event.step: event.value for event in events.Scalars("train/loss")}
    # TensorBoard stores float32.
    assert logged == pytest.approx({step: lines[step]["train/loss"] for step in range(1, 5)}, rel=1e-6)

    # save_period 2, keep_top_k 1
    assert checkpoints(straight) == ["step_4"]


def test_every_metric_is_documented_and_what_is_documented_is_there(straight: Path) -> None:
    names = {name for line in metrics(straight).values() for name in line if name != "step"}
    documented = documented_metrics()
    unknown = [name for name in sorted(names) if not any(pattern.fullmatch(name) for pattern in documented.values())]
    assert unknown == [], "docs/metrics.md lists them all"
    # What takes other settings, another engine or machine, or a fault.
    elsewhere = re.compile(
        r"train/(<task>/)?reference_kl_sum|.*failed_rewards/<part>|(train|val)/skipped/<reason>|val/skipped_samples|"
        r"speed/mfu|.*<task>/length_.*"
    )
    missing = [
        name
        for name, pattern in documented.items()
        if not elsewhere.fullmatch(name) and not any(pattern.fullmatch(metric) for metric in names)
    ]
    assert missing == [], "what is documented should be logged"


def documented_metrics() -> dict[str, re.Pattern[str]]:
    """The metrics of docs/metrics.md, and a pattern of the names that each stands for."""
    rows = [line for line in (ROOT / "docs" / "metrics.md").read_text().splitlines() if line.startswith("| `")]
    names = [name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])]
    return {name: re.compile(re.sub(r"<\w+>", "[^/]+", name)) for name in names}


def test_the_work_of_a_step_is_counted(straight: Path) -> None:
    for line in [line for step, line in metrics(straight).items() if step > 0]:
        # One update, in rows whose groups share their prompts.
        assert line["work/tokens"] > line["work/logprob_tokens"] > 0
        assert line["work/tokens_saved"] > 0
        # Beside a reference policy no pass of generation's is kept: the update runs the tower itself.
        assert line["work/vision_patches"] > 0
        assert line["work/rollout_patches"] > 0
        assert line["speed/model_tflops_per_second"] > 0
        assert "speed/mfu" not in line, "a CPU's peak is not known"
    saved = [line["work/vision_patches_saved"] for step, line in metrics(straight).items() if step > 0]
    assert any(saved), "some row shows one image to two prompts"


def test_a_resumed_run_is_the_straight_run_bit_for_bit(toy: Toy, straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    recipe = toy.recipe(tmp_path / "recipe.yaml", logger={"log_dir": str(run)})
    # How and which checkpoints are kept changes nothing that is learnt; NeMo-RL's way of writing the metric.
    ways = ("checkpointing.async_save=true", "checkpointing.metric_name=val:mean_reward")
    succeed("train", recipe, "grpo.max_num_steps=2", *ways)
    assert checkpoints(run) == ["step_2"]
    manifest = read_manifest(run / "checkpoints" / "step_2")
    assert manifest is not None
    last = {name: value for name, value in metrics(run)[2].items() if name.startswith("val/")}  # val_at_end
    assert set(validation_metrics(TASKS, ["accuracy", "format"])) <= last.keys(), "a recipe may name each of them"
    assert manifest.metrics == last
    assert (run / "checkpoints" / "step_2" / "recipe.yaml").read_text() == (run / "recipe.yaml").read_text()
    # As if the job had been killed in step 4, while it logged, and earlier while it saved.
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "train/loss": 0.0}\n{"step": 4, "tr')
    (run / "checkpoints" / "step_3.partial").mkdir()

    succeed("train", recipe)
    assert checkpoints(run) == ["step_4"]
    expected, resumed = metrics(straight), metrics(run)
    assert list(resumed) == [0, 1, 2, 3, 4]
    assert numbers(resumed[0]) == numbers(expected[0])
    assert numbers(resumed[1]) == numbers(expected[1])
    assert numbers(resumed[3]) == numbers(expected[3])
    assert numbers(resumed[4]) == numbers(expected[4])  # with the validation of the final policy
    assert (run / "hf" / "model.safetensors").read_bytes() == (straight / "hf" / "model.safetensors").read_bytes()


def test_the_export_answers_as_the_policy_does(toy: Toy, straight: Path) -> None:
    exported = straight / "hf"
    model = AutoModelForImageTextToText.from_pretrained(exported, dtype=torch.float32).eval()
    assert type(model).__name__ == "Qwen3VLForConditionalGeneration"
    assert AutoTokenizer.from_pretrained(exported).chat_template
    assert Qwen2VLImageProcessorPil.from_pretrained(exported).patch_size == 8
    for name in ("generation_config.json", "video_preprocessor_config.json", "chat_template.jinja"):
        assert (exported / name).read_bytes() == (toy.model / name).read_bytes()

    # The policy comes from the Megatron checkpoint, not from the directory under test.
    recipe = recipes.load(straight / "recipe.yaml", ["grpo.max_val_samples=12"], "train")
    with assemble(recipe) as components:
        assert Run(recipe, components).first_step == 4
        components.engine.load_weights(components.policy.stream())
        prompts = components.validation
        assert len(prompts) == 36
        rollouts = components.engine.generate(
            prompts, 1, sampling=Sampling(temperature=0.0), seed=0, group_ids=list(range(36))
        )
        assert len({rollout.text for rollout in rollouts}) > 3, "answers that are all alike prove little"
        chat = ChatProcessor(exported)
        ends = chat.eos_token_ids
        for rollout in rollouts:
            answer = hf_greedy(model, rollout.prompt.inputs, 32, ends=ends, pad=chat.pad_token_id, banned=[])
            assert answer == rollout.response_ids.tolist(), rollout.prompt.key


# Tensor and data parallelism are in the next test.
@pytest.mark.parametrize("layout", ["pp2", "cp2", pytest.param("dp2", marks=pytest.mark.full)])
def test_two_ranks_give_the_numbers_of_one(toy: Toy, straight: Path, tmp_path: Path, layout: str) -> None:
    recipe = toy.recipe(tmp_path / "recipe.yaml", logger={"log_dir": str(tmp_path / "run")})
    succeed("train", recipe, *BARE, *LAYOUTS_OF_TWO[layout], nproc=2)
    assert_same_step(metrics(tmp_path / "run")[1], metrics(straight)[1], FIVE_DIGITS)


def test_a_run_continues_at_another_layout(toy: Toy, straight: Path, tmp_path: Path) -> None:
    """The tensor-parallel checkpoint, whose vocabulary is padded, read by two data-parallel ranks."""
    expected, run = metrics(straight), tmp_path / "run"
    recipe = toy.recipe(
        tmp_path / "recipe.yaml", grpo={"val_at_start": False, "val_at_end": False}, logger={"log_dir": str(run)}
    )
    succeed("train", recipe, "grpo.max_num_steps=1", *LAYOUTS_OF_TWO["tp2-sp"], nproc=2)
    assert_same_step(metrics(run)[1], expected[1], FIVE_DIGITS)
    succeed("train", recipe, "grpo.max_num_steps=2", nproc=2)
    resumed = metrics(run)
    assert list(resumed) == [1, 2]
    # Adam's first step divides a gradient by its own size: where that is nothing but rounding, so is the step.
    assert_same_step(resumed[2], expected[2], 1e-4)


# The policy was taught to end with </answer> and its end token; the stop string comes first.
FILTERED = "policy.generation={top_k: 8, top_p: 0.95, stop_strings: [</answer>], val_top_p: 0.9, val_stop_strings: [a]}"


def test_a_run_that_filters_is_measured_in_what_it_sampled_from(toy: Toy, straight: Path, tmp_path: Path) -> None:
    recipe = toy.recipe(tmp_path / "recipe.yaml", logger={"log_dir": str(tmp_path / "run")})
    succeed("train", recipe, *BARE, "grpo.val_at_start=true", FILTERED)
    lines = metrics(tmp_path / "run")
    line, expected = lines[1], metrics(straight)[1]
    assert line["train/rollout_gap_max"] < 1e-4
    assert line["train/ratio"] == 1.0
    assert line["train/entropy"] < expected["train/entropy"], "that of the tokens that were kept"
    # Without its end token a right answer is a token shorter, and no less well-formed.
    assert line["train/response_tokens"] < expected["train/response_tokens"]
    assert line["train/format"] > 0.0
    # Validation has stop strings of its own, which end every response in <thinking>.
    assert lines[0]["val/mean_truncated"] == lines[0]["val/mean_greedy_truncated"] == 0.0
    assert lines[0]["val/mean_response_tokens"] < line["train/response_tokens"] / 2


@pytest.mark.full
@pytest.mark.parametrize("layout", LAYOUTS_OF_TWO)
def test_two_ranks_filter_as_one_does(toy: Toy, tmp_path: Path, layout: str) -> None:
    recipe = toy.recipe(tmp_path / "recipe.yaml")
    runs = [tmp_path / "one", tmp_path / "two"]
    succeed("train", recipe, *BARE, FILTERED, f"logger.log_dir={runs[0]}")
    succeed("train", recipe, *BARE, FILTERED, *LAYOUTS_OF_TWO[layout], f"logger.log_dir={runs[1]}", nproc=2)
    one, two = (metrics(run)[1] for run in runs)
    assert_same_step(two, one, FIVE_DIGITS)
    assert two["train/rollout_gap_max"] < 1e-4


@pytest.mark.full
def test_four_ranks_give_the_numbers_of_one(toy: Toy, straight: Path, tmp_path: Path) -> None:
    recipe = toy.recipe(tmp_path / "recipe.yaml", logger={"log_dir": str(tmp_path / "run")})
    succeed("train", recipe, *BARE, f"{TENSOR_PARALLEL}=2", nproc=4)
    assert_same_step(metrics(tmp_path / "run")[1], metrics(straight)[1], FIVE_DIGITS)


@pytest.mark.full
def test_a_run_moves_from_layout_to_layout(toy: Toy, straight: Path, tmp_path: Path) -> None:
    """Pipeline, context, then tensor x data parallel with everything overlapped: each continues the one before."""
    recipe = toy.recipe(
        tmp_path / "recipe.yaml",
        grpo={"val_at_start": False, "val_at_end": False},
        logger={"log_dir": str(tmp_path / "run")},
        checkpointing={"save_period": 1},
    )
    layouts = (
        (2, LAYOUTS_OF_TWO["pp2"]),
        (2, LAYOUTS_OF_TWO["cp2"]),
        (4, LAYOUTS_OF_TWO["tp2-sp"]),
        (2, LAYOUTS_OF_TWO["dp2"]),
    )
    for step, (nproc, keys) in enumerate(layouts, start=1):
        succeed("train", recipe, f"grpo.max_num_steps={step}", *keys, *DISTRIBUTED, nproc=nproc)
    lines = metrics(tmp_path / "run")
    assert list(lines) == [1, 2, 3, 4]
    assert_same_step(lines[1], metrics(straight)[1], FIVE_DIGITS)
    for step in (2, 3, 4):  # see the tolerance of a second step above
        assert_same_step(lines[step], metrics(straight)[step], 1e-3)


@pytest.mark.full
def test_a_rank_without_rows_changes_nothing(toy: Toy, tmp_path: Path) -> None:
    """One prompt a minibatch: in each of the three updates, one of the two ranks has none; so has the mean weight."""
    recipe = toy.recipe(
        tmp_path / "recipe.yaml",
        grpo={"num_prompts_per_step": 3, "overlong": "mask"},
        loss_fn={"token_level_loss": False},
        policy={"train_global_batch_size": 4},
    )
    succeed("train", recipe, *BARE, f"logger.log_dir={tmp_path / 'free'}")
    # At their mean length, some responses are truncated and some are not, whatever the warm policy has learned.
    limit = f"policy.generation.max_new_tokens={int(metrics(tmp_path / 'free')[1]['train/response_tokens'])}"
    for nproc in (1, 2):
        succeed("train", recipe, *BARE, limit, f"logger.log_dir={tmp_path / str(nproc)}", nproc=nproc)
    one, two = (metrics(tmp_path / str(nproc))[1] for nproc in (1, 2))
    assert 0.0 < one["train/truncated"] < 1.0, "the mask should have something to do"
    # Means over three updates: see the tolerance of a second step above.
    assert_same_step(two, one, 1e-4)


def test_every_update_of_a_step_is_measured_against_the_policy_that_sampled(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = toy.recipe(tmp_path / "recipe.yaml", policy={"train_global_batch_size": 12})
    # Several micro-batches: old log-probabilities and entropies are computed before an update.
    overrides = [f"logger.log_dir={tmp_path / 'run'}", "policy.sequence_packing.train_mb_tokens=128"]
    recipe = recipes.load(path, overrides, "train")
    components = assemble(recipe)
    update, distances, hinges = components.policy.update, [], []

    def measured_update(batches: list[PackedBatch], loss: G2RPOLoss, *args: Any, **named: Any) -> dict[str, float]:
        now = components.policy.logprobs(batches)
        entropies = TaskEntropies.of(batches, now, len(components.tasks), components.policy.groups.data)
        bounds = entropy_bounds(recipe.env, components.tasks)
        fresh = G2RPOLoss(recipe.loss_fn, bounds, components.tasks, entropies, components.policy.groups.context)
        hinges.append((loss.known_term.hinge, fresh.known_term.hinge))
        moved = [0.0]
        for batch, stats in zip(batches, now, strict=True):
            assert batch.old_logprobs is not None
            response = batch.task_ids >= 0
            # The engine has the weights from before the first update; fp32 noise.
            gap = (batch.old_logprobs - batch.behaviour_logprobs)[response].abs().max()
            assert gap < 1e-4, f"update {len(distances) + 1}: behaviour is {gap} away from the rollouts"
            moved.append(float((stats.logprobs - batch.old_logprobs)[response].abs().max()))
        distances.append(max(moved))
        return update(batches, loss, *args, **named)

    monkeypatch.setattr(components.policy, "update", measured_update)
    line = g2rpo_step(recipe, components, 1)
    assert all(used == fresh != 0.0 for used, fresh in hinges), "entropies are those of the weights of the update"
    first, second = distances
    assert first == 0.0  # the same weights and the same rows: the same bits
    assert second > 1e-3
    assert line["train/ratio"] != 1.0
    assert line["train/kl"] > 0.0


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_anew(toy: Toy, tmp_path: Path) -> None:
    run = tmp_path / "run"
    recipe = toy.recipe(tmp_path / "recipe.yaml", logger={"log_dir": str(run)}, checkpointing={"export_hf": False})
    # What a kill leaves: the lines of steps, and no checkpoint.
    result = call("train", recipe, "grpo.max_num_steps=1", "checkpointing.enabled=false")
    assert result.exit_code == 0, result.output
    assert checkpoints(run) == []
    first = metrics(run)
    result = call("train", recipe, "grpo.max_num_steps=1")
    assert result.exit_code == 0, result.output
    assert checkpoints(run) == ["step_1"]
    assert list(metrics(run)) == list(first) == [0, 1]
    assert metrics(run)[1]["train/loss"] == first[1]["train/loss"]
    assert not (run / "hf").exists()
