# SPDX-License-Identifier: Apache-2.0
"""Claim: a model that goes into a Megatron checkpoint at one layout and out of it at another is the same, bit for bit.

Every family, tied and untied, fp32 and bf16, vocabularies that tensor parallelism pads, all weights random.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from tests.common.launch import torchrun_json
from tests.common.text_models import make_text_model
from tests.common.tiny_model import make_tiny_qwen3vl


def make_models(directory: Path, text: list[str]) -> list[Path]:
    """One folder a model, each with a tokenizer's file that must travel along."""
    for tied in (True, False):
        path = directory / f"qwen3_vl-{'tied' if tied else 'untied'}"
        _, model = make_tiny_qwen3vl(None, layers=4, vision_depth=2, deepstack=(0,), vocab=161, tied=tied)
        (model if tied else model.bfloat16()).save_pretrained(path)
        for name in text:
            path = directory / f"{name.replace(', ', '-').replace(' ', '-')}-{'tied' if tied else 'untied'}"
            model = make_text_model(None, name, tied=tied)
            (model.bfloat16() if tied else model).save_pretrained(path)
    models = [path for path in directory.iterdir() if path.is_dir()]
    for path in models:
        (path / "tokenizer.json").write_text(json.dumps({"of": path.name}))
        (path / "chat_template.jinja").write_text("{{ messages }}")
    return models


def convert(directory: Path, processes: int, models: list[Path], pairs: list[str]) -> None:
    """Every model through every pair of layouts; the worker compares, and says how many tensors it has compared."""
    results = torchrun_json(processes, "tests.parallel.convert_worker", str(directory), *pairs, timeout=900)
    names = {model.name for model in models}
    for result in results:
        assert result["tensors"].keys() == names
        assert all(list(tensors) == pairs for tensors in result["tensors"].values())
    first = results[0]  # the rank that reads the files
    assert all(count > 0 for tensors in first["tensors"].values() for count in tensors.values())
    assert first["swapped"] > 0
    full = rf"rank {processes - 1} could not write {directory}/full.*: No space left on device"
    for result in results:  # every rank says it of the one whose disk it is
        assert re.match(full, result["full"]), result["full"]


def check(directory: Path, processes: int, text: list[str], pairs: list[str]) -> None:
    models = make_models(directory, text)
    convert(directory, processes, models, pairs)
    last = directory / "exported"
    source = sorted(models)[-1]
    assert (last / "tokenizer.json").read_text() == (source / "tokenizer.json").read_text()
    assert (last / "chat_template.jinja").exists()
    dtype = json.loads((last / "config.json").read_text())["dtype"]
    assert dtype == json.loads((source / "config.json").read_text())["dtype"] in ("float32", "bfloat16")
    assert getattr(torch, dtype).is_floating_point


@pytest.mark.timeout(900)
def test_models_come_back_from_two_ranks(tmp_path: Path) -> None:
    check(tmp_path, 2, ["qwen3", "llama, scaled positions"], ["2,1,1>1,2,1", "1,2,1>2,1,1"])


@pytest.mark.full
@pytest.mark.timeout(900)
def test_models_come_back_from_four_ranks(tmp_path: Path) -> None:
    pairs = ["1,1,1>4,1,1", "4,1,1>1,4,1", "1,4,1>2,2,1", "2,2,1>1,1,2", "1,2,2>2,1,1"]
    check(tmp_path, 4, ["qwen3", "llama, scaled positions"], pairs)


@pytest.mark.full
@pytest.mark.timeout(900)
def test_models_of_nine_heads_come_back_from_three_ranks(tmp_path: Path) -> None:
    """SmolLM2's shape: nine heads in three groups, which no power of two can share."""
    make_text_model(tmp_path / "llama", "llama", tied=True)
    pairs = ["3,1,1>1,1,1", "1,1,1>3,1,1"]
    convert(tmp_path, 3, [tmp_path / "llama"], pairs)
