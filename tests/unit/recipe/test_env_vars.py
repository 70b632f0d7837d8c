# SPDX-License-Identifier: Apache-2.0
"""Claim: a recipe sets environment variables of its processes, but none that would break them or come too late."""

from __future__ import annotations

import pytest

from megatron_g2rpo import recipe
from megatron_g2rpo.recipe import EXEMPLARS

EXEMPLAR = EXEMPLARS / "vlm_g2rpo.yaml"


def env_vars(text: str) -> dict[str, str]:
    overrides = ["env.tasks.mine={}", f"policy.megatron_cfg.env_vars={text}"]
    return recipe.load(EXEMPLAR, overrides, "train").policy.megatron_cfg.env_vars


def refusal(text: str) -> str:
    with pytest.raises(recipe.RecipeError) as refused:
        env_vars(text)
    return str(refused.value)


def test_variables_of_libraries_are_taken_as_text() -> None:
    text = (
        '{NVTE_FP8_BLOCK_SCALING_FP32_SCALES: "1", PYTORCH_CUDA_ALLOC_CONF: "expandable_segments:True", NCCL_DEBUG: ""}'
    )
    assert env_vars(text) == {
        "NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "1",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "NCCL_DEBUG": "",
    }


def test_a_variable_may_be_set_alone() -> None:
    overrides = ["env.tasks.mine={}", "policy.megatron_cfg.env_vars.NVTE_FP8_BLOCK_SCALING_FP32_SCALES=1"]
    loaded = recipe.load(EXEMPLAR, overrides, "train").policy.megatron_cfg
    assert loaded.env_vars == {"NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "1"}


def test_a_number_is_no_text() -> None:
    assert "'policy.megatron_cfg.env_vars.NVTE_X': Input should be a valid string, got 1 (int)" in refusal(
        "{NVTE_X: 1}"
    )


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        *((name, "set by the launcher") for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")),
        *((name, "set by the launcher") for name in ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID")),
        ("MEGATRON_G2RPO_LAUNCHED", "set by the launcher"),
        ("CUDA_VISIBLE_DEVICES", "which GPUs of a machine are visible"),
        *((name, "read when a process starts") for name in ("OMP_NUM_THREADS", "LD_PRELOAD", "PYTHONPATH", "PATH")),
        *((name, "no name of an environment variable") for name in ("1ST", "A-B", "A B", "A=B", '""')),
    ],
)
def test_other_names_are_refused_with_the_reason(name: str, reason: str) -> None:
    text = refusal(f'{{NCCL_DEBUG: INFO, {name}: "1"}}')
    assert reason in text
    assert "NCCL_DEBUG is" not in text
    assert "policy.megatron_cfg.env_vars" in text


def test_every_wrong_name_is_told_at_once() -> None:
    text = refusal('{RANK: "0", OMP_NUM_THREADS: "4"}')
    assert "'RANK' is set by the launcher" in text
    assert "'OMP_NUM_THREADS' is read when a process starts" in text
