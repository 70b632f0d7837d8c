# SPDX-License-Identifier: Apache-2.0
"""A dataset, a policy and recipes so small that a whole run takes seconds, and the command line to run them with.

Three tasks, one for each shape of input: `sum` has no image, `colour` one, `pair` two of different sizes. The policy is
the quickstart's architecture and chat format with a vocabulary learned from these questions. Its size is odd, so that
tensor parallelism has to pad it.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from megatron_g2rpo.cli import app
from megatron_g2rpo.data.shard_index import ShardIndex
from megatron_g2rpo.data.shard_writer import ShardWriter, write_index
from tests.common.launch import program, ranks
from tests.unit.data.conftest import load_example

ROOT = Path(__file__).resolve().parents[2]
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (240, 240, 240)}
TASKS = ("colour", "pair", "sum")
VOCAB_SIZE = 289
# `cluster.device` of the recipes, cpu or gpu. On a GPU the layers are still those of the CPU, so that the numbers are.
DEVICE = os.environ.get("G2RPO_TEST_DEVICE", "cpu")
LOCAL = ("policy.megatron_cfg.transformer_impl=local", "policy.megatron_cfg.core_attention=local")
ON_DEVICE = (f"cluster.device={DEVICE}", *LOCAL)


def png(colour: str, width: int = 32, height: int = 32) -> bytes:
    """A plain image."""
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), COLOURS[colour]).save(buffer, "PNG")
    return buffer.getvalue()


def sample(task: str, number: int) -> tuple[dict[str, Any], list[bytes]]:
    """Fields and images of the ``number``-th sample of a task."""
    names = list(COLOURS)
    one, two = names[number % 4], names[(number // 4 + number) % 4]
    left, right = number % 4 + 1, number // 4 % 4 + 1
    question, answer, form, images = {
        "colour": ("What colour?", one, "exact", [png(one)]),
        "pair": ("Which colours, in order?", f"{one} {two}", "edit_distance", [png(one), png(two, 48, 32)]),
        "sum": (f"{left} + {right} = ?", str(left + right), "numeric", []),
    }[task]
    thinking = f"{left} + {right}" if task == "sum" else "a look at it"
    fields = {"task": task, "question": question, "answer": answer, "answer_format": form}
    fields["response"] = f"<thinking>{thinking}</thinking><answer>{answer}</answer>"
    if task == "sum":
        fields["reference_steps"] = thinking
    return fields, images


def write_shards(directory: Path, per_task: int, first: int = 0, **changes: Any) -> Path:
    """Shards of ``per_task`` samples of each task, tasks in turn, nine samples a shard; ``changes`` go into each json.

    A field that is set to None is left out.
    """
    with ShardWriter(directory, samples_per_shard=9) as writer:
        for number in range(first, first + per_task):
            for task in TASKS:
                fields, images = sample(task, number)
                fields = {key: value for key, value in {**fields, **changes}.items() if value is not None}
                writer.write(f"{task}-{number}", fields, images)
    return directory


def break_image(directory: Path, task: str, number: int) -> str:
    """Overwrite the first image of a task's ``number``-th sample inside its shard, and write the index again.

    Returns what an error calls it.
    """
    entry = ShardIndex(directory).entries(task)[number]
    member = entry.members["0.png"]
    with entry.shard.open("r+b") as file:
        file.seek(member.offset)
        file.write(b"\0" * member.length)
    write_index(directory)
    return f"shard {entry.shard.name}, sample {entry.key!r}: image '0.png' is no image"


def build_policy(data: Path, directory: Path) -> Path:
    """The quickstart's policy directory, untrained, with a vocabulary of ``VOCAB_SIZE`` learned from ``data/train``."""
    module = load_example("build_policy")
    module.VOCAB_SIZE = VOCAB_SIZE
    module.build(data, directory)
    vocabulary = json.loads((directory / "config.json").read_text())["text_config"]["vocab_size"]
    assert vocabulary % 2 == 1, f"tensor parallelism should have to pad the {vocabulary} rows of the embedding"
    return directory


@dataclass(frozen=True)
class Toy:
    """Paths of the data and a policy.

    Attributes:
        data: holds ``train`` and ``val``.
        model: Hugging Face directory.
        device: ``cluster.device`` of its recipes.
    """

    data: Path
    model: Path
    device: str = DEVICE

    def recipe(self, path: Path, kind: str = "train", **changes: Any) -> Path:
        """Write a recipe for ``kind``; ``changes`` are merged into it at the top level, mapping by mapping."""
        tree = _train(self) if kind == "train" else _sft(self)
        # A page a run would cost more than the toy's steps; the tests of the page ask for it.
        tree = _merged(_merged(tree, {"logger": {"report_enabled": False}}), changes)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(tree))
        return path


def _common(toy: Toy) -> dict[str, Any]:
    length = {"start": 0, "peak_start": 4, "peak_end": 16, "end": 32}
    return {
        "checkpointing": {"save_period": 2, "keep_top_k": 1},
        "policy": {
            "model_name": str(toy.model),
            "precision": "float32",
            "max_total_sequence_length": 128,
            "sequence_packing": {"train_mb_tokens": 640, "shared_prefix": True},
            "megatron_cfg": {"transformer_impl": "local", "core_attention": "local"},
            "generation": {"max_new_tokens": 32},
        },
        "data": {
            "train": {"path": str(toy.data / "train")},
            "validation": {"path": str(toy.data / "val")},
            "format_instruction": False,  # the vocabulary was learned from these questions alone
        },
        # The quickstart's own reward part, so that every run imports a user's file.
        "imports": [str(ROOT / "examples" / "quickstart" / "rewards.py")],
        "env": {
            "reward_workers": 0,  # each process would import torch once more for them; `straight` has some
            "reward_weights": {"_override_": True, "accuracy": 0.9, "format": 0.1, "operands": 0.1, "length": 0.1},
            "default_task": {"length": length},
            "tasks": dict.fromkeys(TASKS),
        },
        "cluster": {"device": toy.device},
    }


def _train(toy: Toy) -> dict[str, Any]:
    loop = {"num_prompts_per_step": 6, "num_generations_per_prompt": 4, "max_num_steps": 4, "val_period": 0}
    return _merged(
        _common(toy),
        {
            "defaults": "vlm_g2rpo.yaml",
            # Whatever a layout or a resumed run could get wrong is on.
            "grpo": {
                **loop,
                "max_val_samples": 4,
                "dynamic_sampling": {"enabled": True, "max_rounds": 2},
                "task_gradient_period": 2,
            },
            "loss_fn": {
                "reference_policy_kl": {"penalty": 0.05},
                "importance_sampling": {"truncated_ratio": 2.0, "sequence_ratio_max": 2.0},
            },
            "policy": {"train_global_batch_size": 24, "megatron_cfg": {"optimizer": {"lr": 3e-4}}},
        },
    )


def _sft(toy: Toy) -> dict[str, Any]:
    constant = {"lr_warmup_steps": 0, "lr_decay_style": "constant"}
    return _merged(
        _common(toy),
        {
            "defaults": "vlm_sft.yaml",
            "sft": {"max_num_steps": 40, "val_period": 0, "max_val_samples": 4, "val_at_start": False},
            "policy": {
                "train_global_batch_size": 12,
                "megatron_cfg": {"optimizer": {"lr": 3e-3}, "scheduler": constant},
            },
        },
    )


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(merged.get(key), Mapping) and isinstance(value, Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def command(*arguments: str | Path, timeout: int = 240) -> subprocess.CompletedProcess[str]:
    """Run ``megatron-g2rpo ARGUMENTS`` as a user does; a run that hangs fails the test."""
    script = Path(sys.executable).with_name("megatron-g2rpo")
    return subprocess.run(
        [str(script), *map(str, arguments)],
        cwd=ROOT,
        # One thread a process: two spin for each other where the machine is busy.
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def succeed(*arguments: str | Path, forked: bool = True, nproc: int = 1) -> str:
    """Run ``megatron-g2rpo ARGUMENTS``, which must succeed, in processes of its own; its standard output.

    Args:
        arguments: the command line.
        forked: from a process that has imported its libraries, where that can be, which saves the seconds that it would
            take; False: as a user starts it.
        nproc: number of processes. Those that are forked are what torchrun would start: without a launcher, and what
            they print is that of all, on either stream.
    """
    words = [str(argument) for argument in arguments]
    if nproc > 1 and forked:
        return ranks(nproc, "megatron_g2rpo.cli", *words, timeout=240, COLUMNS="200")
    if nproc > 1:
        words += ["--nproc", str(nproc)]
    if forked:
        done = program("megatron_g2rpo.cli", *words, timeout=240, OMP_NUM_THREADS="1", COLUMNS="200")
    else:
        done = command(*words)
    assert done.returncode == 0, f"{' '.join(words)}:\n{(done.stdout + done.stderr)[-6000:]}"
    return done.stdout


def call(*arguments: str | Path) -> Result:
    """``megatron-g2rpo ARGUMENTS`` in this process, without the seconds that a new one takes to import its libraries.

    What it does is what ``command`` does, but for the process itself.
    """
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def error_of(*arguments: str | Path) -> str:
    """The one message of a command that must fail in this process, as a user would see it."""
    result = call(*arguments)
    assert isinstance(result.exception, SystemExit), f"{result.exception!r}\n{result.output}"
    assert result.exit_code == 1, result.output
    return only_error(result.stderr)


def only_error(text: str) -> str:
    """Standard error, which must be one message that begins with ``error:``, without a traceback."""
    assert text.startswith("error: "), text
    assert text.count("error: ") == 1, text
    assert "Traceback" not in text
    return text.removeprefix("error: ").strip()


def metrics(run: Path) -> dict[int, dict[str, float]]:
    """Step -> its line of a run's metrics.jsonl; no step may come twice."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines]
    assert steps == sorted(set(steps)), f"steps {steps}"
    return {line["step"]: line for line in lines}


def numbers(line: Mapping[str, float]) -> dict[str, float]:
    """The metrics of a line that a second run must give again: all but seconds, what they go into, and bytes."""
    return {name: value for name, value in line.items() if not name.startswith(("time/", "speed/", "memory/"))}
