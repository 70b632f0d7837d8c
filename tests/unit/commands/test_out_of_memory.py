# SPDX-License-Identifier: Apache-2.0
"""Claim: a lack of memory names the phase, keys that its memory depends on with their values, and the plan to make."""

from __future__ import annotations

import pytest
import torch

from megatron_g2rpo import progress
from megatron_g2rpo import recipe as recipes
from megatron_g2rpo.commands import launch
from megatron_g2rpo.commands.out_of_memory import KEYS, OutOfMemory, explained, keys_of
from tests.common.recipes import G2RPO

ON_GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 79 GiB\nSee documentation")


def message_of(phase: str, error: Exception, *overrides: str) -> str:
    recipe = recipes.load(G2RPO, ["logger.log_dir=/runs/a", *overrides], "train")
    progress.enter(phase, step=12)
    with pytest.raises(OutOfMemory) as raised, explained(recipe):
        raise error
    assert isinstance(raised.value, launch.EXPECTED), "it comes without a traceback"
    return str(raised.value)


def test_an_update_names_rows_chunks_and_recomputation() -> None:
    message = message_of("update", ON_GPU, "policy.sequence_packing.train_mb_tokens=9999")
    assert message.startswith("out of memory in step 12, phase update: CUDA out of memory. Tried to allocate 2.00 GiB")
    assert "policy.sequence_packing.train_mb_tokens: 9999" in message
    assert "policy.megatron_cfg.recompute_granularity: null" in message
    assert "megatron-g2rpo plan /runs/a/recipe.yaml" in message
    assert "generation" not in message


@pytest.mark.parametrize(
    ("backend", "key"),
    [("transformers", "generation.batch_size"), ("vllm", "generation.vllm_cfg.gpu_memory_utilization")],
)
def test_generation_names_what_its_engine_has(backend: str, key: str) -> None:
    message = message_of("generation", ON_GPU, f"policy.generation.backend={backend}")
    assert f"policy.{key}: " in message
    assert "train_mb_tokens" not in message


def test_the_cpus_own_lack_of_memory_is_known() -> None:
    """A real one: an allocation that no machine can make."""
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**50)
    assert type(raised.value) is RuntimeError
    assert "can't allocate memory" in message_of("logprobs", raised.value)


def test_other_errors_pass() -> None:
    recipe = recipes.load(G2RPO, [], "train")
    with pytest.raises(RuntimeError, match="shapes"), explained(recipe):
        raise RuntimeError("shapes differ")


def test_every_key_exists() -> None:
    recipe = recipes.load(G2RPO, [], "train")
    known = recipes.settings(recipe)
    for phase in [*KEYS, "generation", "export"]:
        assert set(keys_of(recipe, phase)) <= known.keys()
