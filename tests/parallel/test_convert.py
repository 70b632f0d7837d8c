# SPDX-License-Identifier: Apache-2.0
"""Claim: a model that goes into a Megatron checkpoint at one layout and out of it at another is the same, bit for bit.

Every family, tied and untied, fp32 and bf16, vocabularies that tensor parallelism pads, all weights random.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.common.launch import torchrun
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


def check(directory: Path, processes: int, text: list[str], pairs: list[str]) -> None:
    models = make_models(directory, text)
    output = torchrun(processes, "-m", "tests.parallel.convert_worker", str(directory), *pairs, timeout=900)
    for model in models:
        for pair in pairs:
            assert f"converted {model.name} {pair}:" in output, output
    assert "a swapped row is seen" in output
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
    output = torchrun(3, "-m", "tests.parallel.convert_worker", str(tmp_path), *pairs, timeout=600)
    assert all(f"converted llama {pair}:" in output for pair in pairs), output
