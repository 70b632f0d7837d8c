# SPDX-License-Identifier: Apache-2.0
"""Claim: the metrics that a recipe may rank its checkpoints by are those that have a name in it."""

from __future__ import annotations

from megatron_g2rpo import recipe
from megatron_g2rpo.recipe.validation_metrics import validation_metrics
from tests.common.recipes import G2RPO


def test_parts_without_a_weight_have_no_metric() -> None:
    names = set(validation_metrics(["ocr"], ["accuracy", "length"]))
    assert {"val/mean_reward", "val/mean_greedy_accuracy", "val/ocr/greedy_response_tokens"} <= names
    assert not any("format" in name or "length" in name for name in names)


def test_nemo_rls_way_of_writing_a_metric_is_taken() -> None:
    loaded = recipe.load(G2RPO, ["checkpointing.metric_name=val:mean_reward"], "train")
    assert loaded.checkpointing.metric_name == "val/mean_reward"
