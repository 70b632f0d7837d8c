# SPDX-License-Identifier: Apache-2.0
"""Engine and trainer, at several layouts, in process and over HTTP, through three training steps with live updates.

What the live engine answers greedily afterwards is what vLLM answers from the exported directory, and transformers too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration

from megatron_g2rpo.data.processing import ChatProcessor
from megatron_g2rpo.data.shard_index import ShardIndex
from megatron_g2rpo.data.stream import validation_prompts
from tests.common.launch import torchrun
from tests.common.tiny_model import hf_greedy
from tests.e2e.conftest import toy, warm  # noqa: F401 (fixtures)
from tests.e2e.toy import TASKS, Toy
from tests.vllm.servers import ServerProcess, serving

pytestmark = pytest.mark.timeout(900)

CACHE = "policy.generation.vllm_cfg.kv_cache_memory_bytes=67108864"
EAGER = "policy.generation.vllm_cfg.enforce_eager=true"
TENSOR = "policy.megatron_cfg.tensor_model_parallel_size=2"
TWO = "cluster.gpus_per_node=2"


@pytest.fixture(scope="module")
def recipe(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:  # noqa: F811
    return toy.recipe(tmp_path_factory.mktemp("recipe") / "recipe.yaml", grpo={"max_val_samples": 18})


@pytest.fixture(scope="module")
def servers(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[ServerProcess]]:
    with serving(recipe, tmp_path_factory.mktemp("servers"), 1, CACHE, EAGER) as started:
        yield started


def trained(recipe: Path, directory: Path, ranks: int, overrides: Sequence[str]) -> dict[str, list[int]]:
    """What the live engine answers greedily after three steps."""
    output = torchrun(ranks, "-m", "tests.vllm.agreement_worker", str(recipe), str(directory), CACHE, EAGER, *overrides)
    for rank in range(ranks):
        assert f"engine and trainer agree on rank {rank}" in output
    return json.loads((directory / "greedy.json").read_text())


def check(recipe: Path, toy: Toy, directory: Path, live: dict[str, list[int]]) -> None:  # noqa: F811
    """vLLM and transformers answer the same from the exported directory."""
    out = directory / "exported.json"
    torchrun(1, "-m", "tests.vllm.exported_worker", str(recipe), str(directory / "hf"), str(out), CACHE, EAGER)
    assert live == json.loads(out.read_text())
    assert live == greedy_of_transformers(toy, directory / "hf")


def greedy_of_transformers(toy: Toy, directory: Path) -> dict[str, list[int]]:  # noqa: F811
    model = Qwen3VLForConditionalGeneration.from_pretrained(directory, dtype=torch.float32).eval()
    processor = ChatProcessor(directory)
    prompts = validation_prompts(ShardIndex(toy.data / "val", known_tasks=set(TASKS)), 18, processor)
    assert sum(len(prompt.inputs.image_grid_thw) > 0 for prompt in prompts) >= 24
    banned = processor.banned_token_ids(model.config.get_text_config().vocab_size)
    ends, pad = [processor.eos_token_id], processor.pad_token_id
    return {prompt.key: hf_greedy(model, prompt.inputs, 32, ends=ends, pad=pad, banned=banned) for prompt in prompts}


def test_in_process(recipe: Path, toy: Toy, tmp_path: Path) -> None:  # noqa: F811
    live = trained(recipe, tmp_path, 1, ["policy.generation.backend=vllm"])
    check(recipe, toy, tmp_path, live)


@pytest.mark.parametrize("shared", [1, 2], ids=["an engine a rank", "one engine for two ranks"])
def test_in_process_beside_a_tensor_parallel_trainer(recipe: Path, toy: Toy, tmp_path: Path, shared: int) -> None:  # noqa: F811
    engine = ["policy.generation.backend=vllm", f"policy.generation.vllm_cfg.tensor_parallel_size={shared}"]
    live = trained(recipe, tmp_path, 2, [*engine, TENSOR, TWO])
    assert live == greedy_of_transformers(toy, tmp_path / "hf")


@pytest.mark.full
@pytest.mark.parametrize("ranks", [1, 2])
def test_over_http(recipe: Path, toy: Toy, servers: list[ServerProcess], tmp_path: Path, ranks: int) -> None:  # noqa: F811
    section = "policy.generation.vllm_server_cfg"
    engine = [
        "policy.generation.backend=vllm_server",
        f"{section}.addresses=['{servers[0].address}']",
        f"{section}.weights_dir={tmp_path / 'weights'}",
    ]
    live = trained(recipe, tmp_path, ranks, [*engine, *([TENSOR, TWO] if ranks == 2 else [])])
    assert live == greedy_of_transformers(toy, tmp_path / "hf")
