# SPDX-License-Identifier: Apache-2.0
"""Claims about ``plan --sweep``: what it proposes fits, is what the overrides make, and comes fastest first."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_g2rpo.models.cards import CARDS
from megatron_g2rpo.plan import sweep as sweeping
from megatron_g2rpo.plan.model import Model, read_config
from megatron_g2rpo.plan.planner import Plan, load_recipe, make_plan
from megatron_g2rpo.plan.speed import estimate
from megatron_g2rpo.plan.sweep import Proposal, sweep

ROOT = Path(__file__).parents[3]
RECIPE = ROOT / "examples" / "recipes" / "vlm_g2rpo-qwen3vl8b-4n8g-megatron-tp4.yaml"
CARD = CARDS["h100"]


def proposals(model: str, gpus: int) -> list[Proposal]:
    built = Model(read_config(str(ROOT / "examples" / "models" / model)))

    def again(overrides: Sequence[str]) -> Plan:
        return make_plan(load_recipe(RECIPE, list(overrides)), built, 2048, 1024, gpu_memory=CARD.memory)

    return sweep(load_recipe(RECIPE, []), gpus, CARD, CARD.memory, again)


def test_proposals_fit_and_come_fastest_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeping, "_TRIED_WITH_ENGINES", 1)
    monkeypatch.setattr(sweeping, "_SIZES", (2, 4))  # seconds in place of half a minute
    found = proposals("qwen3-vl-8b", 16)
    assert found
    rates = [proposal.speed.rate for proposal in found]
    assert rates == sorted(rates, reverse=True)
    assert all(proposal.plan.fits(CARD.memory) and proposal.speed.gpus == 16 for proposal in found)
    engines = {proposal.plan.recipe.policy.generation.backend for proposal in found}
    assert engines == {"vllm", "vllm_server"}
    best = found[0]
    model = Model(read_config(str(ROOT / "examples" / "models" / "qwen3-vl-8b")))
    again = make_plan(load_recipe(RECIPE, list(best.overrides)), model, 2048, 1024, gpu_memory=CARD.memory)
    assert estimate(again, CARD) == best.speed


def test_whole_nodes_are_asked_for() -> None:
    with pytest.raises(ValueError, match=r"--gpus 12: take up to 8, or a multiple of 8"):
        proposals("qwen3-vl-8b", 12)


def test_what_no_layout_can_be_planned_with_is_named_and_larger_gpus_are_not_advised() -> None:
    def again(overrides: Sequence[str]) -> Plan:
        raise ValueError(f"no row holds a sequence ({overrides[0]})")

    with pytest.raises(ValueError, match=r"no row holds a sequence \(cluster\.num_nodes=1\)"):
        sweep(load_recipe(RECIPE, []), 8, CARD, CARD.memory, again)


@pytest.mark.full
def test_a_thousand_gpus_take_less_than_a_minute() -> None:
    start = time.process_time()
    assert proposals("qwen3-vl-32b", 1024)
    assert time.process_time() - start < 60
