# SPDX-License-Identifier: Apache-2.0
"""A run directory as training leaves it, made up: metrics, recipe, data and recorded rollouts that tell a known story.

Three tasks. At step ``FORMAT_STEP`` all answers become well formed while accuracy stays: a jump that is of the format
alone. After step ``WORSE_STEP`` the task ``grounding`` gets worse. Everything else is noise around a slow rise.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from megatron_g2rpo.data.shard_writer import ShardWriter
from megatron_g2rpo.records.schema import Header, columns

TASKS = ("grounding", "ocr", "visual/qa")  # a task's name may have slashes
PARTS = ("accuracy", "format", "length")
WEIGHTS = {"accuracy": 0.8, "format": 0.2, "length": 0.0}
FORMAT_STEP, WORSE_STEP = 40, 60
WORDS = ("the", "answer", "is", "a", "red", "box", "seven", "left", "of", "it", "<eos>", "maybe")
PROMPTS = 8  # of each task
MODEL = "model"
"""Folder of the tokenizer, beside the run directory."""


def write_recorded_run(
    run: Path,
    *,
    steps: int = 80,
    groups: int = 2,
    answers: int = 4,
    texts: Sequence[str] = (),
    with_data: bool = True,
    seed: int = 0,
    recipe: dict[str, Any] | None = None,
) -> Path:
    """Write a run directory, its data and its tokenizer in the folder that it lies in.

    Args:
        run: the run directory; its parent gets ``data/`` and ``model/``.
        steps: number of steps.
        groups: groups of each task and step.
        answers: rollouts of a group.
        texts: responses that take the place of the first ones of the last step.
        with_data: whether the images are there.
        seed: of the noise.
        recipe: keys of ``loss_fn`` that differ from the usual.
    """
    run.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    if with_data and not (run.parent / "data").exists():
        _write_data(run.parent / "data")
    _write_tokenizer(run.parent / MODEL)
    _write_recipe(run, recipe or {})
    lines = [{"step": 0, **_validation(0, steps)}]
    for step in range(1, steps + 1):
        rows = [row for task in TASKS for row in _groups_of(task, step, steps, groups, answers, rng)]
        for row, text in zip(rows if step == steps else (), texts, strict=False):
            row["response_text"] = text
        write_step(run, step, rows)
        validation = _validation(step, steps) if step in (steps // 2, steps) else {}
        lines.append({"step": step, **_metrics(rows, step, rng), **validation})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def write_step(run: Path, step: int, rows: Sequence[dict[str, Any]], *, is_finished: bool = True) -> Path:
    """Write the record of one step, a row each with the columns of ``records.schema``."""
    kinds = columns(PARTS)
    header = Header(
        run_id="r", release="0", recipe="d", step=step, rollouts=len(rows), data_ranks=1, parts=PARTS,
        is_finished=is_finished,
    )  # fmt: skip
    schema = pa.schema(kinds.items(), metadata=header.metadata())
    path = run / "rollouts" / f"step_{step:06d}.parquet"
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist([{name: row.get(name) for name in kinds} for row in rows], schema), path)
    return path


def reward_of(parts: dict[str, float]) -> float:
    """The weighted sum of the parts."""
    return sum(WEIGHTS[name] * value for name, value in parts.items())


def _groups_of(
    task: str, step: int, steps: int, groups: int, answers: int, rng: np.random.Generator
) -> list[dict[str, Any]]:
    rows = []
    for number in range(groups):
        prompt = (step * groups + number) % PROMPTS
        parts = [_parts(task, step, steps, rng) for _ in range(answers)]
        rewards = np.array([reward_of(each) for each in parts])
        spread = rewards.std()
        advantages = (rewards - rewards.mean()) / spread if spread > 1e-6 else np.zeros(answers)
        group_id = TASKS.index(task) * groups + number
        for index in range(answers):
            tokens = int(rng.integers(4, 10))
            rows.append(
                _row(task, step, prompt, group_id, index, parts[index], rewards[index], advantages[index], tokens, rng)
            )
    return rows


def _parts(task: str, step: int, steps: int, rng: np.random.Generator) -> dict[str, float]:
    accuracy = 0.4 + 0.2 * step / steps - (0.35 if task == "grounding" and step > WORSE_STEP else 0.0)
    formed = 1.0 if step >= FORMAT_STEP else float(rng.random() < 0.3)
    return {"accuracy": float(rng.random() < accuracy), "format": formed, "length": 1.0}


def _row(
    task: str, step: int, prompt: int, group_id: int, index: int, parts: dict[str, float], reward: float,
    advantage: float, tokens: int, rng: np.random.Generator,
) -> dict[str, Any]:  # fmt: skip
    ids = rng.integers(0, len(WORDS), tokens).tolist()
    old = -rng.exponential(0.7, tokens)
    box = [8 + index, 8, 40 + index, 40]
    answer = json.dumps(box) if task == "grounding" else WORDS[ids[0]]
    key = f"shard-000000/train-{TASKS.index(task) * PROMPTS + prompt:06d}"
    return {
        "step": step,
        "update": 0,
        "weights_version": step - 1,
        "data_rank": 0,
        "task": task,
        "prompt_key": key,
        "group_id": group_id,
        "sample_index": index,
        "prompt_text": f"<image>Question {prompt}?",
        "question": f"Question {prompt}?",
        "reference": "[8, 8, 40, 40]" if task == "grounding" else "seven",
        "answer_format": "box_iou" if task == "grounding" else "exact",
        "images": [f"{key}#0"],
        "image_widths": [64],
        "image_heights": [64],
        "response_text": " ".join(WORDS[each] for each in ids),
        "answer": answer if parts["format"] else None,
        "well_formed": bool(parts["format"]),
        "response_ids": ids,
        "behaviour_logprobs": (old + rng.normal(0, 0.01, tokens)).tolist(),
        "old_logprobs": old.tolist(),
        "entropies": rng.uniform(0.1, 1.0, tokens).tolist(),
        "reward": reward,
        **{f"reward_{name}": value for name, value in parts.items()},
        "advantage": float(advantage),
        "truncated": tokens == 9,
        "masked": None,
        "engine": "transformers",
        "seconds": 0.5,
    }


def _metrics(rows: Sequence[dict[str, Any]], step: int, rng: np.random.Generator) -> dict[str, float]:
    metrics: dict[str, float] = {}
    for prefix, mine in [("", rows), *((f"{task}/", [r for r in rows if r["task"] == task]) for task in TASKS)]:
        for name in ("reward", *(f"reward_{part}" for part in PARTS)):
            metrics[f"train/{prefix}{name.removeprefix('reward_')}"] = float(np.mean([row[name] for row in mine]))
        metrics[f"train/{prefix}response_tokens"] = float(np.mean([len(row["response_ids"]) for row in mine]))
        metrics[f"train/{prefix}entropy"] = float(np.mean([np.mean(row["entropies"]) for row in mine]))
        metrics[f"train/{prefix}rollout_gap_mean"] = 0.01
        metrics[f"train/{prefix}zero_variance_groups"] = float(rng.random() * 0.3)
    for task in TASKS:
        metrics[f"train/{task}/advantage_normal_distance"] = float(rng.random() * 0.1)
        if step % 20 == 0:
            metrics[f"train/{task}/gradient_share"] = 1 / len(TASKS)
    phases = {"data": 0.1, "generation": 2.0, "logprobs": 0.5, "rewards": 0.1, "update": 1.3}
    return {
        **metrics,
        **{f"time/{name}": value * float(rng.uniform(0.9, 1.1)) for name, value in phases.items()},
        "time/step": sum(phases.values()),
        "train/grad_norm": float(rng.random()),
        "train/kl": 0.001,
        "train/clipped_low": 0.0,
        "train/clipped_high": 0.01,
        "train/rollout_gap_max": 0.1,
        "train/rollout_gap_kl": 0.001,
        "train/num_tokens": float(sum(len(row["response_ids"]) for row in rows)),
        "train/real_tokens": 0.9,
        "memory/peak_gb": 3.0,
    }


def _validation(step: int, steps: int) -> dict[str, float]:
    value = 0.4 + 0.2 * step / steps
    names = [f"{place}{prefix}{name}" for place in (*(f"{task}/" for task in TASKS), "mean_")
             for prefix in ("", "greedy_") for name in ("reward", "accuracy")]  # fmt: skip
    return {f"val/{name}": value for name in names}


def _write_recipe(run: Path, loss_fn: dict[str, Any]) -> None:
    length = {"start": 1, "peak_start": 4, "peak_end": 8, "end": 12}
    recipe = {
        "grpo": {"adv_estimator": {"name": "g2rpo"}},
        "loss_fn": {"entropy_shaping": {"enabled": True}, **loss_fn},
        "policy": {"model_name": MODEL},
        "data": {"train": {"path": "data"}, "validation": None},
        "env": {
            "reward_weights": WEIGHTS,
            "default_task": {"length": None, "entropy": {"low": 0.2, "high": 0.6}, "reward_weights": {}},
            "tasks": {task: {"length": length, "entropy": None} for task in TASKS},
        },
    }
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))


def _write_data(directory: Path) -> None:
    with ShardWriter(directory) as writer:
        for number in range(len(TASKS) * PROMPTS):
            task = TASKS[number // PROMPTS]
            image = Image.new("RGB", (64, 64), (40 * (number % 6), 90, 200 - 20 * (number % 8)))
            image.paste((250, 210, 40), (8, 8, 40, 40))
            file = io.BytesIO()
            image.save(file, "PNG")
            fields = {
                "task": task,
                "question": f"<image>Question {number % PROMPTS}?",
                "answer": "[8, 8, 40, 40]" if task == "grounding" else "seven",
                "answer_format": "box_iou" if task == "grounding" else "exact",
            }
            writer.write(f"train-{number:06d}", fields, [file.getvalue()])


def _write_tokenizer(directory: Path) -> None:
    directory.mkdir(exist_ok=True)
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="the"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))
