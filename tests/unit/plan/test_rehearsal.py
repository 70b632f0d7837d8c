# SPDX-License-Identifier: Apache-2.0
"""Claim: a rehearsal counts what a real run holds and sends, and notices a layout or a plan that is wrong.

The truth is a real policy of the same tiny model, in one process and on two ranks over gloo, on the same packed row.
Rehearsals run in processes of their own, because they pretend to have joined a job.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_g2rpo.commands.rehearsal.comparison import deviations, traffic_figures
from megatron_g2rpo.commands.rehearsal.stage import StageRehearsal, Traffic
from megatron_g2rpo.plan.model import Model, read_config
from megatron_g2rpo.plan.planner import Plan, load_recipe, make_plan
from tests.common.launch import ROOT, program, torchrun_json
from tests.unit.plan.rehearsal_worker import CASES

PAPER = ROOT / "examples" / "recipes" / "vlm_g2rpo-qwen3vl8b-8n8g-megatron-tp4.yaml"
# Those that run on a CPU, and the layout of a real run, at the quickstart's size and at its own: a minute.
CPU_RECIPES = sorted((ROOT / "examples" / "recipes").glob("*-1n1g-*.yaml"))
QWEN = f"policy.model_name={ROOT / 'examples' / 'models' / 'qwen3-vl-8b'}"
QUICKSTART = f"policy.model_name={ROOT / 'examples' / 'quickstart' / 'policy'}"
# The published shape of SmolLM2-135M-Instruct.
SMOLLM2 = {
    "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    "max_position_embeddings": 8192, "rope_theta": 100000, "rms_norm_eps": 1e-5, "hidden_act": "silu",
}  # fmt: skip

# Against the allocator in one process: equal but for a few numbers. What a recomputed layer makes of the row's index
# tensors, 8 bytes a token, is kept here and not in a real run. On two ranks against autograd's saved tensors, of which
# results that nobody saves are none.
KEPT = {1: 1e-3, 2: 2e-2}
KEPT_RECOMPUTED = 2.5e-2
PEAK = 0.02


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.full)])
def test_it_counts_what_a_real_run_holds_and_sends(tmp_path: Path, ranks: int) -> None:
    """State and messages are equal, to the byte and one by one; activations and their peak as stated above."""
    reports = torchrun_json(ranks, "tests.unit.plan.rehearsal_worker", str(tmp_path), timeout=900)
    compared = 0
    for report in reports:
        assert report.keys() == CASES[ranks].keys()
        for name, found in report.items():
            if found is None:  # a rank that no rehearsal stands for
                continue
            compared += 1
            for what in ("state", "messages"):
                rehearsed, real = found[what]
                assert rehearsed == real, (name, what)
            assert found["messages"][1] or ranks == 1, f"{name}: the real run sent nothing"
            recomputes = "full" in name or "selective" in name
            # Several in flight; and autograd does not see what closures hold.
            if ranks == 1 or not (recomputes or "pipeline" in name):
                rehearsed, real = found["activations"]
                share = KEPT_RECOMPUTED if recomputes else KEPT[ranks]
                assert rehearsed == pytest.approx(real, rel=share), (name, "activations")
            if ranks == 1:
                rehearsed, real = found["peak"]
                assert rehearsed == pytest.approx(real, rel=PEAK), (name, "peak")
    assert compared == len(CASES[ranks]) + (1 if ranks == 2 else 0), "the pipeline has two stages, each a rehearsal"


def rehearse(recipe: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    return program("megatron_g2rpo.cli", "plan", str(recipe), "--rehearse", "--json", *overrides, timeout=900)


@pytest.mark.parametrize(
    ("recipe", "model"),
    [
        *((path, None if "smollm2" in path.stem else QUICKSTART) for path in CPU_RECIPES),
        pytest.param(PAPER, QUICKSTART, id="the paper's layout"),
        pytest.param(PAPER, QWEN, id="the paper's run", marks=pytest.mark.full),
    ],
    ids=lambda value: value.stem if isinstance(value, Path) else "",
)
def test_every_shipped_recipe_is_rehearsed(tmp_path: Path, recipe: Path, model: str | None) -> None:
    """At the real sizes, with the config of the real model; the plan is within its stated shares of what is counted."""
    if model is None:
        (tmp_path / "config.json").write_text(json.dumps(SMOLLM2))
        model = f"policy.model_name={tmp_path}"
    done = rehearse(recipe, model)
    assert done.returncode == 0, done.stderr
    rehearsal: dict[str, Any] = json.loads(done.stdout)["rehearsal"]
    assert rehearsal["deviations"] == []
    for stage in rehearsal["stages"]:
        assert min(stage[name] for name in ("weights", "gradients", "optimizer", "activations", "peak")) > 0
    if recipe == PAPER:  # tensor parallel 4 with sequence parallelism, the optimizer's state over 16
        kinds = {(line["collective"], line["group"]) for line in rehearsal["stages"][0]["traffic"]}
        assert {
            ("all-gather", "tensor (4)"),
            ("reduce-scatter", "tensor (4)"),
            ("reduce-scatter", "data x context (16)"),
            ("all-gather", "tensor x context (4)"),
        } <= kinds


def test_what_megatron_core_refuses_is_one_error_that_names_the_stage() -> None:
    """Four heads over three ranks, with this project's own check of the layout taken out."""
    recipe = ROOT / "examples" / "recipes" / "vlm_g2rpo-quickstart-1n1g-megatron-tp1.yaml"
    world = ["cluster.gpus_per_node=3", "policy.megatron_cfg.tensor_model_parallel_size=3"]
    arguments = ("plan", str(recipe), "--rehearse", *world, "policy.train_global_batch_size=256")
    done = program("tests.unit.plan.unchecked_program", *arguments, timeout=900)
    assert done.returncode == 1
    [error] = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "stage 0 of 1 (rank 0 of 3): building the model" in error, error
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(load_recipe(PAPER, [QWEN]), Model(read_config(QWEN.partition("=")[2])))


def as_planned(plan: Plan) -> StageRehearsal:
    """A rehearsal that counted what the plan says."""
    stage = plan.stages[0]
    empty = StageRehearsal(
        stage=0,
        rank=0,
        micro_batches=1,
        weights=stage.state.weights,
        gradients=stage.state.gradients,
        optimizer=stage.state.optimizer,
        activations=stage.activations,
        peak=stage.phases["update"],
        optimizer_peak=0,
        traffic=(),
        seconds=0.0,
    )
    lines = []
    for figure in traffic_figures(plan, empty):
        collective, group = figure.name.split(", ")
        lines.append(Traffic(collective, group, 1, figure.planned, figure.planned, ((figure.planned, 1),)))
    return replace(empty, traffic=tuple(lines))


def test_a_plan_that_says_what_is_counted_has_no_deviation(plan: Plan) -> None:
    assert list(deviations(plan, [as_planned(plan)])) == []


@pytest.mark.parametrize(
    ("field", "factor", "name"),
    [
        ("weights", 1.001, "weights"),
        ("gradients", 0.5, "gradients"),
        ("optimizer", 1.001, "optimizer state"),
        ("optimizer", 0.98, "optimizer state"),
        ("activations", 1.02, "activations in flight"),
        ("activations", 0.8, "activations in flight"),
        ("peak", 1.01, "update at its peak"),
        ("peak", 0.7, "update at its peak"),
    ],
)
def test_a_figure_that_is_off_is_named(plan: Plan, field: str, factor: float, name: str) -> None:
    counted = as_planned(plan)
    off = replace(counted, **{field: round(getattr(counted, field) * factor)})
    [sentence] = deviations(plan, [off])
    assert sentence.startswith(f"stage 0, {name}: planned"), sentence


def test_traffic_that_is_off_or_missing_is_named(plan: Plan) -> None:
    counted = as_planned(plan)
    large = next(line for line in counted.traffic if line.collective == "reduce-scatter" and "tensor (4)" in line.group)
    others = tuple(line for line in counted.traffic if line is not large)
    [doubled] = deviations(plan, [replace(counted, traffic=(*others, replace(large, sent=2 * large.sent)))])
    [missing] = deviations(plan, [replace(counted, traffic=others)])
    for sentence in (doubled, missing):
        assert sentence.startswith("stage 0, reduce-scatter, tensor (4): planned"), sentence
