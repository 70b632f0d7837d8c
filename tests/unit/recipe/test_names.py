# SPDX-License-Identifier: Apache-2.0
"""Every name of a recipe, and every option that belongs to one, is checked when the recipe is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from torch import Tensor

from megatron_g2rpo import recipe, registry
from megatron_g2rpo.recipe import EXEMPLARS, TrainRecipe

G2RPO = EXEMPLARS / "vlm_g2rpo.yaml"
TASKS = "env.tasks={math: {}, ocr: {}}"


def load(*overrides: str) -> TrainRecipe:
    return recipe.load(G2RPO, [TASKS, *overrides], "train")


def failure(*overrides: str) -> str:
    with pytest.raises(recipe.RecipeError) as error:
        load(*overrides)
    return str(error.value)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["grpo.adv_estimator.name=g2rpoo"],
            "override 'grpo.adv_estimator.name=g2rpoo': unknown advantage estimator 'g2rpoo' (did you mean 'g2rpo'?); "
            "known: ",
        ),
        (
            ["loss_fn.name=ppoo"],
            "override 'loss_fn.name=ppoo': unknown surrogate 'ppoo' (did you mean 'ppo'?); known: ",
        ),
        (
            ["env.tasks.math.answer_format=numericc"],
            "override 'env.tasks.math.answer_format=numericc': env.tasks.math.answer_format: unknown answer format "
            "'numericc' (did you mean 'numeric'?); known: ",
        ),
        (
            ["policy.generation.backend=vlm"],
            "override 'policy.generation.backend=vlm': policy.generation.backend: unknown rollout engine 'vlm' (did "
            "you mean 'vllm'?); known: ",
        ),
        (
            ["env.reward_weights.acuracy=1.0"],
            "env.reward_weights.acuracy: unknown reward part 'acuracy' (did you mean 'accuracy'?); known: ",
        ),
        (
            ["env.tasks.math.reward_weights={lenght: 1.0}"],
            "env.tasks.math.reward_weights.lenght: unknown reward part 'lenght' (did you mean 'length'?); known: ",
        ),
        (
            ["data.response_format=thinking_anser"],
            "data.response_format: unknown response format 'thinking_anser' (did you mean 'thinking_answer'?); known: ",
        ),
        (
            ["env.tasks.ocr.response_format=boxd"],
            "env.tasks.ocr.response_format: unknown response format 'boxd' (did you mean 'boxed'?); known: ",
        ),
    ],
)
def test_a_wrong_name_says_where_it_is_and_what_there_is(overrides: list[str], message: str) -> None:
    text = failure(*overrides)
    assert message in text
    known = text.partition(message)[2].splitlines()[0]
    kind = next(kind for kind in registry.KINDS if f"unknown {kind.kind} '" in message)
    assert set(known.partition(". ")[0].split(", ")) == set(kind.names())
    assert "A name of your own is known once `imports` lists its file" in text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["grpo.adv_estimator={name: rloo, zero_variance: keep}"],
            "advantage estimator 'rloo' takes no option 'zero_variance'; it is an option of g2_gdpo, g2rpo",
        ),
        (
            ["grpo.adv_estimator={name: grpo, variance: unit}"],
            "advantage estimator 'grpo' takes no option 'variance'; it is an option of g2_gdpo, g2rpo",
        ),
        (
            ["grpo.adv_estimator={name: dr_grpo, tie_tolerance: 0.1}"],
            "advantage estimator 'dr_grpo' takes no option 'tie_tolerance'; it is an option of g2_gdpo, g2rpo, ",
        ),
        (
            ["grpo.adv_estimator.tie_tolerence=0.1"],
            "advantage estimator 'g2rpo' takes no option 'tie_tolerence' (did you mean 'tie_tolerance'?); known: ",
        ),
        (
            ["loss_fn.sapo_tau_positive=5"],
            "'ppo' takes no option 'sapo_tau_positive'; it is an option of sapo",
        ),
        (
            ["loss_fn={name: cispo, ratio_clip_c: 2.0}"],
            "surrogate 'cispo' takes no option 'ratio_clip_c'; it is an option of gspo, ppo",
        ),
        (
            ["policy.generation.backend_cfg={batch: 3}"],
            "'transformers' takes no option 'batch'",
        ),
    ],
)
def test_a_foreign_or_misspelt_option_is_refused(overrides: list[str], message: str) -> None:
    text = failure(*overrides)
    assert message in text
    assert f"override '{overrides[0]}'" in text


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "grpo.adv_estimator.zero_variance=dropp",
            "'grpo.adv_estimator.zero_variance': Input should be 'drop' or",
        ),
        (
            "grpo.adv_estimator.tie_tolerance=-1.0",
            "'grpo.adv_estimator.tie_tolerance': Input should be greater than",
        ),
        ("grpo.adv_estimator.tie_tolerance='3'", "'grpo.adv_estimator.tie_tolerance': Input should be a valid number"),
        ("grpo.adv_estimator.stages=[]", "'grpo.adv_estimator.stages': "),
        ("grpo.adv_estimator.stages=[prompt]", "'grpo.adv_estimator.stages.0': Input should be 'group' or 'task'"),
        ("grpo.adv_estimator.stages=[group, group]", "'grpo.adv_estimator.stages': stages must be a list of one or"),
        ("grpo.adv_estimator={name: ema_grpo, ema_decay: 1.0}", "'grpo.adv_estimator.ema_decay': Input should be less"),
        ("loss_fn.ratio_clip_min=1.5", "'loss_fn.ratio_clip_min': Input should be less than or equal to 1"),
        ("loss_fn.ratio_clip_max=.inf", "'loss_fn.ratio_clip_max': Input should be a finite number, got inf (float)"),
        ("loss_fn.ratio_clip_c=1.0", "'loss_fn.ratio_clip_c': Input should be greater than 1"),
        ("loss_fn={name: sapo, sapo_tau_negative: 0.0}", "'loss_fn.sapo_tau_negative': Input should be greater than 0"),
    ],
)
def test_a_value_out_of_an_options_range_is_refused(override: str, message: str) -> None:
    assert f"override '{override}': {message}" in failure(override)


def test_defaults_are_those_of_the_function_and_are_written_out() -> None:
    loaded = load()
    assert loaded.grpo.adv_estimator.options == {
        "stages": ["group", "task"],
        "tie_tolerance": 1e-6,
        "zero_variance": "drop",
        "variance": "as_is",
    }
    assert loaded.loss_fn.options == {"ratio_clip_min": 0.2, "ratio_clip_max": 0.3, "ratio_clip_c": 3.0}
    assert "zero_variance: drop" in recipe.dump(loaded)
    assert load("loss_fn.name=cispo").loss_fn.options == {"ratio_clip_min": 0.2, "ratio_clip_max": 0.3}


@pytest.mark.parametrize("name", registry.estimators.names())
def test_every_estimator_can_be_named_and_bound(name: str) -> None:
    loaded = load(f"grpo.adv_estimator.name={name}")
    assert set(loaded.grpo.adv_estimator.options) == set(registry.estimators.options(name))
    loaded.grpo.adv_estimator.bound()


@pytest.mark.parametrize("name", registry.surrogates.names())
def test_every_surrogate_can_be_named_and_bound(name: str) -> None:
    loaded = load(f"loss_fn.name={name}", "loss_fn.log_ratio_clamp=7.0")
    assert set(loaded.loss_fn.options) == set(registry.surrogates.options(name))
    assert loaded.loss_fn.bound().keywords["log_ratio_clamp"] == 7.0  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("estimator", "refused"),
    [
        ("{name: g2rpo}", True),
        ("{name: g2rpo, stages: [task]}", False),
        ("{name: grpo}", True),
        ("{name: rloo}", True),
        ("{name: gdpo}", True),
        ("{name: reinforce_plus_plus}", True),
        ("{name: reinforce_plus_plus, baseline: batch}", False),
    ],
)
def test_groups_of_one_are_refused_where_they_have_no_advantage(estimator: str, refused: bool) -> None:
    single = ["grpo.num_generations_per_prompt=1", "policy.train_global_batch_size=128"]
    overrides = [f"grpo.adv_estimator={estimator}", *single]
    if refused:
        assert "a group of 1 has no advantage under" in failure(*overrides)
    else:
        load(*overrides)


def test_wrong_names_are_listed_with_every_other_fault() -> None:
    message = failure("loss_fn.name=ppoo", "grpo.adv_estimator.name=g2rpoo", "grpo.sed=3", "policy.precision=float8")
    assert len(message.splitlines()) == 5


@pytest.fixture
def own_estimator() -> Iterator[str]:
    @registry.estimators.register("scaled", min_group_size=lambda factor, **_: int(factor))
    def scaled(batch: object, history: object, *, factor: float = 2.0, note: str | None = None) -> Tensor:
        raise NotImplementedError

    yield "scaled"
    del registry.estimators._entries["scaled"]


def test_an_estimator_of_ones_own_brings_its_options(own_estimator: str) -> None:
    assert load(f"grpo.adv_estimator.name={own_estimator}").grpo.adv_estimator.options == {"factor": 2.0, "note": None}
    loaded = load(f"grpo.adv_estimator={{name: {own_estimator}, factor: 3, note: x}}")
    assert loaded.grpo.adv_estimator.options == {"factor": 3.0, "note": "x"}
    message = failure(f"grpo.adv_estimator={{name: {own_estimator}, factr: 3}}")
    assert "'scaled' takes no option 'factr' (did you mean 'factor'?); known: factor, note" in message
    assert "'grpo.adv_estimator.factor': Input should be a valid number" in failure(
        f"grpo.adv_estimator={{name: {own_estimator}, factor: x}}"
    )
    assert "a group of 8 has no advantage" in failure(f"grpo.adv_estimator={{name: {own_estimator}, factor: 9}}")


def test_a_recipe_written_out_is_the_same_recipe(tmp_path: Path) -> None:
    loaded = load("grpo.adv_estimator={name: ema_grpo, ema_decay: 0.5}", "loss_fn.name=sapo")
    (tmp_path / "dumped.yaml").write_text(recipe.dump(loaded))
    assert recipe.load(tmp_path / "dumped.yaml", [], "train") == loaded


@pytest.mark.parametrize("override", ["env.tasks.math.answer_format=[numeric]", "env.default_task.response_format={}"])
def test_a_list_in_the_place_of_a_name_is_a_fault_and_no_crash(override: str) -> None:
    assert "Input should be a valid string, got" in failure(override)


@pytest.fixture
def forget_estimators() -> Iterator[None]:
    before = dict(registry.estimators._entries)
    yield
    registry.estimators._entries.clear()
    registry.estimators._entries.update(before)


@pytest.mark.usefixtures("forget_estimators")
def test_a_recipe_with_an_option_that_is_a_tuple_is_read_and_written_out(tmp_path: Path) -> None:
    @registry.estimators.register("ranged")
    def ranged(batch: object, history: object, *, ends: tuple[float, float] = (0.0, 1.0)) -> None: ...

    for overrides in ([], ["grpo.adv_estimator.ends=[0.0, 2.0]"]):
        loaded = load("grpo.adv_estimator.name=ranged", *overrides)
        file = tmp_path / "recipe.yaml"
        file.write_text(recipe.dump(loaded))
        assert recipe.load(file, [], "train") == loaded


@pytest.mark.usefixtures("forget_estimators")
def test_a_default_is_held_to_its_annotation() -> None:
    @registry.estimators.register("broken")
    def broken(batch: object, history: object, *, limit: int = 1.5) -> None: ...  # type: ignore[assignment]

    assert "'grpo.adv_estimator.limit': Input should be a valid integer" in failure("grpo.adv_estimator.name=broken")

    @registry.estimators.register("functional")
    def functional(batch: object, history: object, *, pick: object = max) -> None: ...

    assert "the default of its option 'pick'" in failure("grpo.adv_estimator.name=functional")


@pytest.mark.usefixtures("forget_estimators")
def test_only_the_annotations_of_options_must_resolve() -> None:
    @registry.estimators.register("typed")
    def typed(batch: OnlyForTypeCheckers, history: object, *, limit: float = 1.0) -> None: ...  # noqa: F821  # pyright: ignore

    assert load("grpo.adv_estimator.name=typed").grpo.adv_estimator.options == {"limit": 1.0}

    @registry.estimators.register("misspelt")
    def misspelt(batch: object, history: object, *, limit: flaot = 1.0) -> None: ...  # noqa: F821  # pyright: ignore

    assert "the annotation 'flaot' of its option 'limit'" in failure("grpo.adv_estimator.name=misspelt")
