# SPDX-License-Identifier: Apache-2.0
"""Claims about what a plan says of shared prompts: it counts both ways, each as the recipe of that way is planned."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from megatron_g2rpo.plan.cards import CARDS
from typer.testing import CliRunner

from megatron_g2rpo import cli
from megatron_g2rpo.plan.model import Model, read_config
from megatron_g2rpo.plan.passes import without_gradient
from megatron_g2rpo.plan.planner import Plan, load_recipe, make_plan
from megatron_g2rpo.plan.sharing import KEY, both_ways, other_way
from megatron_g2rpo.plan.speed import estimate
from megatron_g2rpo.recipe import TrainRecipe

ROOT = Path(__file__).parents[3]
PAPER = ROOT / "examples" / "recipes" / "vlm_g2rpo-qwen3vl8b-8n8g-megatron-tp4.yaml"
CONFIG = f"policy.model_name={ROOT / 'examples' / 'models' / 'qwen3-vl-8b'}"
CARD = CARDS["h100"]
MEGATRON = "policy.megatron_cfg."


@pytest.fixture(scope="module")
def model() -> Model:
    return Model(read_config(CONFIG.partition("=")[2]))


def plan(model: Model, *overrides: str, mean: int | None = 1524, image: int | None = 1024) -> Plan:
    response = None if mean is None else mean - 1100
    return make_plan(load_recipe(PAPER, [CONFIG, *overrides]), model, mean, image, response_tokens=response)


def test_both_ways_are_the_plans_of_both_recipes(model: Model) -> None:
    shared, unshared = plan(model), plan(model, f"{KEY}=false")
    for one, other in ((shared, unshared), (unshared, shared)):
        ways = both_ways(one, other, CARD)
        assert ways.on == (one is shared)
        assert other_way(one) == f"{KEY}={str(other is shared).lower()}"
        for way, of in ((ways.shared, shared), (ways.unshared, unshared)):
            speed = estimate(of, CARD)
            assert (way.logprobs, way.update, way.step) == (speed.logprobs, speed.update, speed.step)
            assert (way.peak, way.micro_batches) == (of.worst.peak, 4 * of.batches.count)


def test_the_counted_tokens_are_those_of_prompts_and_responses(model: Model) -> None:
    """By hand: 512 prompts of 1,100 tokens, of which a trunk has one less, and 8 responses of 424 each."""
    ways = both_ways(plan(model), plan(model, f"{KEY}=false"), CARD)
    assert ways.together == 8
    assert (ways.shared.tokens, ways.unshared.tokens) == (512 * (1099 + 8 * 424), 512 * 8 * 1524)
    # Pairs of a query and a key: the trunk's triangle, and each response's trunk and own triangle.
    pairs = 512 * (1099**2 / 2 + 8 * (424 * 1099 + 424**2 / 2))
    assert ways.shared.attention_flops == pytest.approx(4 * 36 * 4096 * pairs)
    assert ways.unshared.attention_flops == pytest.approx(4 * 36 * 4096 * 512 * 8 * 1524**2 / 2)
    assert ways.saves
    assert "saves 63% of the tokens of a pass with prompts of 1,100 and 8 responses of 424 tokens" in ways.sentence


def test_it_says_so_where_sharing_is_off_or_saves_nothing(model: Model) -> None:
    off = both_ways(plan(model, f"{KEY}=false"), plan(model), CARD)
    assert "Sharing prompts would save 63%" in off.sentence
    longest = both_ways(plan(model, mean=None, image=None), plan(model, f"{KEY}=false", mean=None, image=None), CARD)
    assert (longest.together, longest.saves) == (1, False)
    assert "saves nothing" in longest.sentence
    assert "train_mb_tokens" in longest.sentence


def test_more_images_in_a_row_take_more_memory(model: Model) -> None:
    """The hazard of short responses: a row then holds the images of many groups, and the tower keeps more of each."""
    plain = f"{MEGATRON}recompute_granularity=null"
    ways = both_ways(plan(model, plain, mean=1150), plan(model, plain, f"{KEY}=false", mean=1150), CARD)
    assert ways.shared.tokens < ways.unshared.tokens / 4
    assert ways.shared.activations > ways.unshared.activations


def test_recomputing_the_core_attention_saves_the_keys_that_branches_look_up(model: Model) -> None:
    def activations(*overrides: str) -> int:
        return plan(model, *overrides).worst.layer_activations

    none, selective = (f"{MEGATRON}recompute_granularity={kind}" for kind in ("null", "selective"))
    looked_up = activations(none) - activations(none, f"{KEY}=false")
    assert looked_up > 0
    assert activations(none) - activations(selective) > looked_up


def test_shared_rows_gather_keys_before_attention(model: Model) -> None:
    """Transformer Engine's ring, which hides its messages, is for rows without branches."""
    context = (f"{MEGATRON}context_parallel_size=2", f"{MEGATRON}cp_comm_type=p2p")

    def named(*overrides: str) -> set[str]:
        return {line.what for line in plan(model, *context, *overrides).traffic[0] if "keys and values" in line.what}

    assert named() == {"keys and values, gathered first"}
    assert named(f"{KEY}=false") == {"keys and values"}


@pytest.mark.parametrize(
    ("overrides", "passes"),
    [
        (["loss_fn.entropy_shaping.enabled=false"], 3),  # of four updates, the first gives its own
        (["loss_fn.entropy_shaping.enabled=false", "policy.train_global_batch_size=4096"], 0),  # one update
        (["loss_fn.entropy_shaping.enabled=false", "loss_fn.reference_policy_kl.penalty=0.1"], 3 + 4),
        (
            [
                "loss_fn.entropy_shaping.enabled=false",
                "loss_fn.reference_policy_kl.penalty=0.1",
                "loss_fn.reference_policy_kl.where=reward",
            ],
            4 + 4,
        ),
    ],
)
def test_passes_without_gradient_are_those_that_a_step_needs(overrides: list[str], passes: int) -> None:
    recipe = load_recipe(PAPER, [CONFIG, *overrides])
    assert isinstance(recipe, TrainRecipe)
    assert without_gradient(recipe, 8) == passes


def test_a_step_without_passes_before_it_has_no_seconds_for_them(model: Model) -> None:
    one = ["loss_fn.entropy_shaping.enabled=false", "policy.train_global_batch_size=4096"]
    assert estimate(plan(model, *one), CARD).logprobs == 0
    several = plan(model, one[0])
    assert estimate(several, CARD).logprobs == pytest.approx(3 / 4 * estimate(several, CARD).update / 4, rel=0.3)
    # Messages are an optimizer step's on average.
    assert several.passes == 3


def test_the_features_that_a_host_keeps_are_said() -> None:
    arguments = ["plan", str(PAPER), CONFIG, "--json", "policy.vision_cache_mb=500"]
    result = CliRunner().invoke(cli.app, arguments)
    tree = json.loads(result.output)
    assert tree["host"] == {"vision_cache": 500_000_000, "vision_cache_of_a_node": 4_000_000_000}
    assert tree["sharing"]["on"] is True
    assert tree["sharing"]["shared"]["peak"] == tree["verdict"]["peak"]


def test_the_embedded_engine_holds_a_prompt_once_for_its_responses(model: Model) -> None:
    def cache(samples: int) -> int:
        overrides = ["policy.generation.backend=transformers", "policy.generation.batch_size=64"]
        sizes = [f"grpo.num_generations_per_prompt={samples}", f"grpo.num_prompts_per_step={4096 // samples}"]
        return plan(model, *overrides, *sizes).worst.cache

    assert cache(8) < 0.5 * cache(2)
