# SPDX-License-Identifier: Apache-2.0
"""Claim: generation's pass of the tower serves the update where it can, and what stands against it is said."""

from __future__ import annotations

import pytest

from megatron_g2rpo import recipe as recipes
from megatron_g2rpo.recipe.vision_graphs import why_no_graphs
from tests.common.recipes import G2RPO, SFT

ROOM = ("policy.max_total_sequence_length=4096",)


def why(*overrides: str) -> str | None:
    return why_no_graphs(recipes.load(G2RPO, ["loss_fn.reference_policy_kl.penalty=0", *ROOM, *overrides], "train"))


def test_the_exemplar_s_model_and_engine_can() -> None:
    assert why("policy.generation.backend=transformers") is None


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["policy.vision_graph_mb=0"], "vision_graph_mb is 0"),
        (["policy.vision_cache_mb=0"], "vision_cache_mb is 0"),
        (["policy.megatron_cfg.freeze_vision=true"], "frozen"),
        (["policy.generation.backend=vllm"], "engine vllm"),
        (["policy.megatron_cfg.tensor_model_parallel_size=2", "cluster.gpus_per_node=2"], "ranks share rows"),
        (["policy.megatron_cfg.pipeline_model_parallel_size=2", "cluster.gpus_per_node=2"], "ranks share rows"),
        (["policy.megatron_cfg.context_parallel_size=2", "cluster.gpus_per_node=2"], "ranks share rows"),
        (["policy.megatron_cfg.distributed_data_parallel_config.overlap_grad_reduce=true"], "overlapped"),
        (["loss_fn.reference_policy_kl.penalty=0.1"], "reference policy"),
        (["policy.megatron_cfg.fp8_cfg.enabled=true"], "FP8"),
    ],
)
def test_what_stands_against_it_is_said(overrides: list[str], reason: str) -> None:
    found = why("policy.generation.backend=transformers", *overrides)
    assert found is not None
    assert reason in found


def test_supervised_training_generates_nothing_to_learn_from() -> None:
    assert why_no_graphs(recipes.load(SFT, list(ROOM), "sft")) == "nothing is generated for training"
