# SPDX-License-Identifier: Apache-2.0
"""Claims about what a plan says of Transformer Engine, FP8, replayed masks and text-only models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from megatron_g2rpo.plan import transformer_engine
from megatron_g2rpo.plan.activations import layer
from megatron_g2rpo.plan.model import Model, read_config
from megatron_g2rpo.plan.planner import Plan, load_recipe, make_plan
from megatron_g2rpo.plan.sizes import Modules, Sizes, modules_of
from megatron_g2rpo.plan.slots import Slots

ROOT = Path(__file__).parents[3]
RECIPES, MODELS = ROOT / "examples" / "recipes", ROOT / "examples" / "models"
TEXT = RECIPES / "g2rpo-qwen38b-1n8g-megatron-tp4.yaml"
MEGATRON = "policy.megatron_cfg."
LOCAL = (f"{MEGATRON}transformer_impl=local", f"{MEGATRON}core_attention=local")
FP8 = f"{MEGATRON}fp8_cfg.enabled=true"
# S = 10 tokens, s = 5 between regions, h = 8, H = 4, G = 2, D = 2, F = 6, bfloat16.
SIZE = Sizes(
    tokens=10, shared=5, hidden=8, heads=4, groups=2, head_dim=2, features=6, projected=8, columns=32, nbytes=2,
    modules=Modules(layers="transformer_engine", attention="transformer_engine"),
)  # fmt: skip
SLOTS = Slots(10, 10, 10, 0, copied=False)
# A trunk of 4 tokens and two branches of 3, each of which looks up the trunk's keys.
BRANCHES = Slots(10, 10, 4 + 2 * (4 + 3), 0)


@pytest.fixture(scope="module")
def text_model() -> Model:
    return Model(read_config(str(MODELS / "qwen3-8b")))


def plan(model: Model, *overrides: str) -> Plan:
    return make_plan(load_recipe(TEXT, list(overrides)), model)


def test_a_layer_of_transformer_engine_keeps_what_its_modules_save() -> None:
    """Worked out by hand from what each module saves, two bytes an element unless said."""
    norm_and_projection = 2 * (5 * 8) + 4 * 5 + 2 * (5 * 8)  # input, a float32 root each, operand
    head_norms = 10 * (4 + 2) * (2 * 2 + 4)  # inputs of two bytes, a float32 root a head
    angles = 4 * 2 * 10 * 2  # cosines and sines, for queries and for keys
    core = 2 * 10 * (4 + 2 + 2) * 2 + 4 * 10 * 4  # queries, keys, values; a float32 log-sum-exp a query and head
    outputs = 2 * 10 * 4 * 2  # one tensor with the output projection's operand
    mlp = norm_and_projection + 4 * 2 * 10 * 6 + 2 * 10 * 6  # gate, up, activated gate, up + 0; operand
    assert layer(SIZE, SLOTS, selective=False) == (norm_and_projection + head_norms + angles + core + outputs + mlp)
    # Recomputing the core attention saves its log-sum-exps and nothing else: inputs and outputs are kept anyway.
    assert layer(SIZE, SLOTS, selective=False) - layer(SIZE, SLOTS, selective=True) == 4 * 10 * 4
    fused = replace(SIZE, modules=replace(SIZE.modules, fused_rope=True, fused_activation=True))
    assert layer(SIZE, SLOTS, selective=False) - layer(fused, SLOTS, selective=False) == angles + 2 * 2 * 10 * 6


def test_branches_keep_the_keys_of_their_trunk_once_each_unless_attention_is_recomputed() -> None:
    """Worked out by hand: looked-up keys and values, the attention's own outputs, and the places of both look-ups."""
    plain, branches = (layer(SIZE, slots, selective=False) for slots in (SLOTS, BRANCHES))
    assert branches - plain == 2 * (18 - 10) * (2 + 2) * 2 + 2 * 10 * 4 * 2
    # Recomputed, a layer keeps the row's own queries, keys and values, as without branches.
    assert layer(SIZE, BRANCHES, selective=True) == layer(SIZE, SLOTS, selective=True)


def test_fp8_keeps_operands_in_one_byte_and_attention_in_two() -> None:
    fp8 = replace(SIZE, modules=replace(SIZE.modules, fp8="tensorwise"))
    operands = 2 * (5 * 8) + 10 * 6  # of both normalised projections and the MLP's second: a byte less each
    outputs = 10 * 4 * 2  # the output projection's operand, beside the core attention's own outputs
    assert layer(SIZE, SLOTS, selective=False) - layer(fp8, SLOTS, selective=False) == operands - outputs
    blocks = replace(SIZE, modules=replace(SIZE.modules, fp8="blockwise"))
    assert transformer_engine.operand(blocks, 128) == 128 + 4  # a float32 scale for 128 values


def test_a_plan_takes_what_the_machine_would(text_model: Model) -> None:
    def modules(*overrides: str) -> Modules:
        return modules_of(load_recipe(TEXT, list(overrides)), text_model.config)

    assert (modules().layers, modules().attention) == ("transformer_engine", "transformer_engine")
    assert (modules("cluster.device=cpu").layers, modules("cluster.device=cpu").attention) == ("local", "local")
    assert modules(*LOCAL).layers == "local"
    assert modules(FP8).fp8 == "blockwise"


def test_transformer_engine_keeps_less_than_the_local_modules(text_model: Model) -> None:
    engine, local = plan(text_model).worst, plan(text_model, *LOCAL).worst
    assert engine.layer_activations < 0.75 * local.layer_activations
    assert engine.state == local.state


def test_fp8_weights_are_held_twice_beside_the_models_own(text_model: Model) -> None:
    bf16, fp8 = plan(text_model).worst.state, plan(text_model, FP8).worst.state
    # The linears of 36 layers over 4 ranks: query, key, value, output; gate, up, down.
    linears = 36 * (4096 * (4096 + 2 * 1024) + 4096 * 4096 + 3 * 4096 * 12288) // 4
    assert (bf16.fp8, fp8.fp8, fp8.weights) == (0, 2 * linears, bf16.weights)
    primary = plan(text_model, FP8, f"{MEGATRON}fp8_cfg.fp8_param=true").worst.state
    assert (primary.fp8, primary.weights) == (linears, bf16.weights - linears)
    ends = plan(text_model, FP8, f"{MEGATRON}first_last_layers_bf16=true").worst.state
    assert ends.fp8 == 2 * linears * 34 // 36


def test_fp8_weights_travel_in_one_byte(text_model: Model) -> None:
    def gathered(*overrides: str) -> int:
        [line] = [line for line in plan(text_model, *overrides).traffic[0] if line.what == "updated weights"]
        return line.sent

    linears = plan(text_model, FP8).worst.state.fp8 // 2
    # Over two data-parallel ranks each sends half of the saving.
    assert gathered(FP8) - gathered(FP8, f"{MEGATRON}fp8_cfg.fp8_param=true") == linears // 2


def test_the_ids_that_tokens_were_sampled_from_are_counted(text_model: Model) -> None:
    plain, replayed = plan(text_model), plan(text_model, "policy.generation.top_k=64")
    row = plain.batches.row
    extra = replayed.worst.output_activations - plain.worst.output_activations
    assert extra == 8 * 64 * (row.tokens + row.labels)
    assert replayed.worst.update_working > plain.worst.update_working


def test_a_text_only_model_has_no_images(text_model: Model) -> None:
    planned = plan(text_model)
    assert planned.assumptions.image_tokens == planned.batches.images == 0
    assert not any("image" in line.what for line in planned.traffic[0])
    with pytest.raises(ValueError, match="--image-tokens 7: qwen3 is a text-only model"):
        make_plan(planned.recipe, text_model, None, 7)
