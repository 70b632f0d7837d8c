# SPDX-License-Identifier: Apache-2.0
"""Claims: the metrics that a recipe may rank its checkpoints by have a name in it, and data behind them."""

from __future__ import annotations

from megatron_g2rpo import recipe
from megatron_g2rpo.recipe.validation_metrics import unmeasured, validation_metrics
from tests.common.recipes import G2RPO


def test_parts_without_a_weight_have_no_metric() -> None:
    names = set(validation_metrics(["ocr"], ["accuracy", "length"]))
    assert {"val/mean_reward", "val/mean_greedy_accuracy", "val/ocr/greedy_response_tokens"} <= names
    assert not any("format" in name or "length" in name for name in names)


def test_nemo_rls_way_of_writing_a_metric_is_taken() -> None:
    loaded = recipe.load(G2RPO, ["checkpointing.metric_name=val:mean_reward"], "train")
    assert loaded.checkpointing.metric_name == "val/mean_reward"


def test_a_metric_of_a_task_without_validation_data_is_never_measured() -> None:
    assert unmeasured("val/ocr/greedy_reward", {"chart", "count"}) == (
        "checkpointing.metric_name: val/ocr/greedy_reward is never measured, as data.validation has no usable sample "
        "of task ocr; it has chart, count (val/mean_greedy_reward is over all that it has)"
    )
    for metric, tasks in (
        (None, {"a"}),
        ("val/mean_reward", {"a"}),
        ("val/ocr/reward", {"ocr"}),
        ("val/a/b/reward", {"a/b"}),
    ):
        assert unmeasured(metric, tasks) is None
