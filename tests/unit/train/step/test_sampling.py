# SPDX-License-Identifier: Apache-2.0
"""Claims: a step's batch is filled with groups that have signal, within a budget, deterministically, and says so."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_g2rpo import registry
from megatron_g2rpo.policy.device import init_process_group, select
from megatron_g2rpo.recipe import TrainRecipe
from megatron_g2rpo.rollout.base import EngineUnavailable, GenerationWork, Sampling
from megatron_g2rpo.tasks.part_calls import Ask, ask_in_turn
from megatron_g2rpo.tasks.scoring import RewardError
from megatron_g2rpo.train.run.stopping import Stopping
from megatron_g2rpo.train.step.generation import answers_both_ways
from megatron_g2rpo.train.step.sampling import Collected, collect
from megatron_g2rpo.train.step.timers import Timers
from megatron_g2rpo.types import ModelInputs, Prompt, Response, Rewards, Rollout, Sample

MakeRecipe = Callable[..., TrainRecipe]
SAMPLES = 4
# Right answers of four samples to each prompt of the stream, and again from the start: 0, 2, 3 and 6 have no signal.
RIGHT = (0, 2, 4, 0, 1, 3, 4, 2, 1, 1, 3, 2)


class Stream:
    """Prompts by their number in the stream."""

    def __init__(self, position: int = 0) -> None:
        self.position = position

    def next_batch(self, n: int, rows: range) -> list[Prompt]:
        first, self.position = self.position, self.position + n
        return [prompt(first + row) for row in rows]


class Engine:
    """Answers each prompt right as often as ``RIGHT`` says; notes what it was asked.

    Attributes:
        losses: raised by the next calls of ``generate``, one each.
    """

    def __init__(self) -> None:
        self.loads = self.releases = 0
        self.losses: list[EngineUnavailable] = []
        self.asked: list[list[int]] = []
        self.seeds: list[int] = []
        self.samplings: list[Sampling] = []

    def load_weights(self, weights: Iterable[Any]) -> None:
        self.loads += 1

    def release(self) -> None:
        self.releases += 1

    def generate(
        self, prompts: Sequence[Prompt], n: int, *, sampling: Sampling, seed: int, group_ids: Sequence[int]
    ) -> list[Rollout]:
        if self.losses:
            raise self.losses.pop()
        self.asked.append([int(prompt.key) for prompt in prompts])
        self.seeds.append(seed)
        self.samplings.append(sampling)
        return [
            Rollout(
                prompt=prompt,
                group_id=group,
                sample_index=sample,
                response_ids=torch.arange(1 + sample),
                logprobs=torch.zeros(1 + sample),
                text=f"<answer>{int(sample < right(prompt))}</answer>",
                truncated=False,
            )
            for prompt, group in zip(prompts, group_ids, strict=True)
            for sample in range(n)
        ]


def right(prompt: Prompt) -> int:
    return RIGHT[int(prompt.key) % len(RIGHT)]


def prompt(number: int) -> Prompt:
    inputs = ModelInputs(
        token_ids=torch.arange(3), pixel_values=torch.zeros(0, 6), image_grid_thw=torch.zeros(0, 3, dtype=torch.int64)
    )
    sample = Sample(key=str(number), task="ab"[number % 2], question="", answer="1", answer_format="exact")
    return Prompt(sample=sample, inputs=inputs, task_id=number % 2)


@pytest.fixture
def components() -> Any:
    """What ``collect`` reads of the components, in a world of one: a whole one has a model."""
    init_process_group(select("cpu"))
    world = dist.group.WORLD
    groups = SimpleNamespace(data=world, data_rank=0, data_size=1, model=world, model_rank=0, model_size=1)
    policy = SimpleNamespace(groups=groups, source=lambda: iter(()))
    return SimpleNamespace(policy=policy, stream=Stream(), engine=Engine(), workers=None, stopping=Stopping(None))


@pytest.fixture
def recipe(make_recipe: MakeRecipe) -> MakeRecipe:
    """Recipes of four prompts a step; the reward is the accuracy alone."""

    def make(*overrides: str) -> TrainRecipe:
        return make_recipe(
            "grpo.num_prompts_per_step=4", f"grpo.num_generations_per_prompt={SAMPLES}",
            "policy.train_global_batch_size=16", "env.tasks._override_=true",
            "env.tasks.a={entropy: null}", "env.tasks.b={entropy: null}",
            "env.reward_weights={accuracy: 1, format: 0, structure: 0, length: 0}", *overrides,
        )  # fmt: skip

    return make


DYNAMIC = "grpo.dynamic_sampling.enabled=true"


def run(recipe: TrainRecipe, components: Any, step: int = 1) -> Collected:
    return collect(recipe, components, step, Timers(select("cpu")))


def groups(collected: Collected) -> list[int]:
    """Number in the stream of each group's prompt, by group id; every group whole."""
    found = {rollout.group_id: int(rollout.prompt.key) for rollout in collected.rollouts}
    assert sorted(found) == list(range(4))
    assert len(collected.rollouts) == len(collected.rewards.total) == 4 * SAMPLES
    for rollout, reward in zip(collected.rollouts, collected.rewards.total.tolist(), strict=True):
        assert rollout.prompt.key == str(found[rollout.group_id])
        assert reward == float(rollout.sample_index < right(rollout.prompt))
    return [found[group] for group in sorted(found)]


def counts(collected: Collected) -> dict[str, float]:
    return {name.removeprefix("train/sampling/"): value for name, value in collected.metrics.items()}


def test_without_dynamic_sampling_a_step_is_the_next_prompts(components: Any, recipe: MakeRecipe) -> None:
    collected = run(recipe(), components)
    assert groups(collected) == [0, 1, 2, 3]
    assert collected.metrics == {}
    assert components.engine.asked == [[0, 1, 2, 3]]


def test_rollouts_are_sampled_as_the_recipe_says_for_training(components: Any, recipe: MakeRecipe) -> None:
    run(recipe("policy.generation={temperature: 0.9, stop_strings: [a, b], val_stop_strings: [c]}"), components)
    assert components.engine.samplings == [Sampling(temperature=0.9, stop_strings=("a", "b"))]


def test_groups_without_signal_are_replaced_round_by_round(components: Any, recipe: MakeRecipe) -> None:
    collected = run(recipe(DYNAMIC), components)
    assert groups(collected) == [1, 4, 5, 7]
    # 0, 2 and 3 are dropped, then 6: three prompts are asked in their place, then one.
    assert components.engine.asked == [[0, 1, 2, 3], [4, 5, 6], [7]]
    assert counts(collected) == {
        "rounds": 3.0, "groups_drawn": 8.0, "groups_dropped": 4.0, "groups_surplus": 0.0, "groups_unfilled": 0.0,
    }  # fmt: skip
    assert components.engine.loads == 1, "the weights do not change within a step"
    assert components.engine.releases == 1, "no round may come after the engine's memory is given back"
    assert len(set(components.engine.seeds)) == 3, "a prompt that comes again is to be answered differently"
    assert components.stream.position == 8, "the next step draws what comes then"


def test_oversampling_asks_for_more_and_keeps_the_first(components: Any, recipe: MakeRecipe) -> None:
    collected = run(recipe(DYNAMIC, "grpo.dynamic_sampling.oversampling=2.5"), components)
    assert components.engine.asked == [list(range(10))]
    assert groups(collected) == [1, 4, 5, 7]
    assert counts(collected) == {
        "rounds": 1.0, "groups_drawn": 10.0, "groups_dropped": 4.0, "groups_surplus": 2.0, "groups_unfilled": 0.0,
    }  # fmt: skip


def test_what_the_budget_leaves_unfilled_keeps_its_dropped_groups(components: Any, recipe: MakeRecipe) -> None:
    collected = run(recipe(DYNAMIC, "grpo.dynamic_sampling.max_rounds=2"), components)
    assert groups(collected) == [0, 1, 4, 5], "the first that was dropped, in the order of the stream"
    assert counts(collected)["groups_unfilled"] == 1.0
    assert counts(collected)["rounds"] == 2.0


def test_mean_accuracy_is_filtered_with_its_bounds_excluded(components: Any, recipe: MakeRecipe) -> None:
    bounds = ("grpo.dynamic_sampling.filter_low=0.25", "grpo.dynamic_sampling.filter_high=0.75")
    collected = run(recipe(DYNAMIC, *bounds, "grpo.dynamic_sampling.max_rounds=9"), components)
    assert groups(collected) == [1, 7, 11, 13], "those with half of the answers right"


def test_a_filter_looks_at_accuracy_not_at_the_reward(components: Any, recipe: MakeRecipe) -> None:
    """Rewards of prompt 0 differ by their length alone, and its mean accuracy is 0."""
    length = "env.tasks.a={length: {start: 0, peak_start: 4, peak_end: 9, end: 9}, entropy: null}"
    weights = "env.reward_weights={accuracy: 1, format: 0, structure: 0, length: 0.1}"
    collected = run(recipe(DYNAMIC, length, weights), components)
    assert int(collected.rollouts[0].prompt.key) == 0, "without bounds, a difference in length is signal"
    components.stream, components.engine = Stream(), Engine()
    collected = run(recipe(DYNAMIC, length, weights, "grpo.dynamic_sampling.filter_low=0.01"), components)
    assert int(collected.rollouts[0].prompt.key) == 1


def test_a_resumed_run_draws_what_the_whole_run_would_have(components: Any, recipe: MakeRecipe) -> None:
    short = recipe(DYNAMIC, "grpo.num_prompts_per_step=2", "policy.train_global_batch_size=8")
    run(short, components, 1)
    position = components.stream.position
    whole = run(short, components, 2)
    components.stream, components.engine = Stream(position), Engine()
    resumed = run(short, components, 2)
    assert [rollout.prompt.key for rollout in resumed.rollouts] == [rollout.prompt.key for rollout in whole.rollouts]
    assert torch.equal(resumed.rewards.total, whole.rewards.total)
    assert resumed.metrics == whole.metrics


def test_penalised_responses_lose_reward_near_the_limit(components: Any, recipe: MakeRecipe) -> None:
    options = ("grpo.overlong=penalise", "grpo.overlong_penalty={buffer: 2, weight: 0.5}")
    collected = run(recipe(*options, "policy.generation.max_new_tokens=4"), components)
    # Responses of 1 to 4 tokens: the penalty begins after 2, and is whole at 4.
    assert collected.rewards.parts["overlong"].tolist() == [0.0, 0.0, -0.5, -1.0] * 4
    accuracy = collected.rewards.parts["accuracy"]
    assert torch.equal(collected.rewards.total, accuracy + 0.5 * collected.rewards.parts["overlong"])
    assert collected.rewards.weights["overlong"].unique().tolist() == [0.5]


class Failing:
    """A part that fails for the first samples of some prompts.

    Attributes:
        times: number of a prompt in the stream -> how many of its samples fail.
    """

    def __init__(self) -> None:
        self.times: dict[int, int] = {}

    def __call__(self, sample: Sample, response: Response) -> float:
        if response.sample_index < self.times.get(int(sample.key), 0):
            raise OSError("no connection")
        return 0.0


@pytest.fixture
def failing() -> Iterator[Failing]:
    part = Failing()
    registry.reward_parts.register("failing")(part)
    yield part
    del registry.reward_parts._entries["failing"]


FAILING = "env.reward_weights.failing=0"


def test_what_failed_is_counted_by_part_and_named(components: Any, recipe: MakeRecipe, failing: Failing) -> None:
    failing.times = {1: 2, 3: 1}
    collected = run(recipe(FAILING, "env.max_failed_rewards=0.2"), components)
    assert collected.rewards.failed.nonzero().flatten().tolist() == [4, 5, 12]
    failed = collected.failed
    assert failed.metrics("train/failed_rewards") == {
        "train/failed_rewards": 3.0, "train/failed_rewards/failing": 3.0,
    }  # fmt: skip
    first, *named = failed.lines("so it is")
    assert first == "warning: 3 of 16 rewards failed; so it is. The first:"
    assert len(named) == 3
    assert "reward failing of sample 1, task 'b', response 0: raised OSError: no connection" in named[0]
    collected = run(recipe(FAILING), components)
    assert collected.failed.metrics("train/failed_rewards") == {"train/failed_rewards": 0.0}
    assert collected.failed.lines("so it is") == []


def test_too_many_failures_end_the_run(components: Any, recipe: MakeRecipe, failing: Failing) -> None:
    failing.times = {1: 2, 3: 1}
    with pytest.raises(RewardError, match=r"(?s)3 rewards, more than env.max_failed_rewards .*failing 3.*sample 1"):
        run(recipe(FAILING, "env.max_failed_rewards=0.18"), components)
    components.stream = Stream()
    run(recipe(FAILING, "env.max_failed_rewards=0.1875"), components)  # 3 of 16: not above it


def test_a_group_with_too_few_rewards_is_replaced(components: Any, recipe: MakeRecipe, failing: Failing) -> None:
    """Group 1 is left with one reward, group 5 with none, and group 4 with three equal ones."""
    failing.times = {1: 3, 4: 1, 5: 4}
    collected = run(recipe(DYNAMIC, FAILING, "env.max_failed_rewards=0.5"), components)
    assert [rollout.prompt.key for rollout in collected.rollouts[::SAMPLES]] == ["7", "8", "9", "10"]
    assert collected.failed.scored == 4 * len({key for keys in components.engine.asked for key in keys})
    assert collected.metrics["train/sampling/groups_dropped"] == 7.0
    assert len(collected.failed.failures) == 8, "those of dropped groups are counted, too"


class StreamingEngine(Engine):
    """Hands over each group as it is answered, the last first; notes what it was handed in return."""

    def generate(self, prompts: Sequence[Prompt], n: int, *, on_finished: Any = None, **keywords: Any) -> list[Rollout]:
        rollouts = super().generate(prompts, n, **keywords)
        if on_finished is not None:
            for start in reversed(range(0, len(rollouts), n)):
                on_finished(rollouts[start : start + n])
        return rollouts


class Workers:
    """What a pool is asked, and when: answered in this process."""

    def __init__(self, options: Any) -> None:
        self.options, self.asked = options, list[list[str]]()

    def submit(self, asks: Sequence[Ask]) -> list[Any]:
        self.asked.append([ask.call.sample.key for ask in asks])
        results = [ask_in_turn(ask, self.options) for ask in asks]
        return [SimpleNamespace(results=lambda: results)]


def test_workers_score_what_is_finished_while_the_rest_is_sampled(components: Any, recipe: MakeRecipe) -> None:
    late = run(recipe(), components)
    components.stream, components.engine, components.workers = Stream(), StreamingEngine(), Workers({})
    early = run(recipe(), components)
    assert components.workers.asked == [[str(number)] * SAMPLES for number in (3, 2, 1, 0)]
    assert torch.equal(early.rewards.total, late.rewards.total)
    assert [r.prompt.key for r in early.rollouts] == [r.prompt.key for r in late.rollouts]
    components.stream, components.workers = Stream(), Workers({})
    components.policy.groups.model_size, components.policy.groups.model_rank = 1, 0
    components.engine = Engine()  # takes no such function
    assert torch.equal(run(recipe(), components).rewards.total, late.rewards.total)
    assert len(components.workers.asked) == 1


def test_rewards_of_some_rollouts() -> None:
    none = Rewards.none(3)
    some = none.plus("x", torch.arange(3, dtype=torch.float64), 2.0)[torch.tensor([2, 0])]
    assert some.total.tolist() == [4.0, 0.0]
    assert some.parts["x"].tolist() == [2.0, 0.0]
    assert some.weights["x"].tolist() == [2.0, 2.0]


def test_an_engine_that_may_be_waited_for_is_given_the_weights_again_and_asked_anew(
    components: Any, recipe: MakeRecipe
) -> None:
    expected = run(recipe(), components)
    components.stream, components.engine = Stream(), Engine()
    components.engine.losses = [EngineUnavailable("gone", wait=True), EngineUnavailable("gone again", wait=True)]
    collected = run(recipe(), components)
    assert components.engine.loads == 3
    assert components.engine.asked == [[0, 1, 2, 3]]
    assert [r.prompt.key for r in collected.rollouts] == [r.prompt.key for r in expected.rollouts]


def test_an_engine_that_filters_and_does_not_say_what_it_kept_ends_the_step(
    components: Any, recipe: MakeRecipe
) -> None:
    with pytest.raises(RuntimeError, match=r"^Engine filters by .*top_k, but its rollouts do not say what it kept"):
        run(recipe("policy.generation.top_k=5"), components)


def test_an_engine_that_is_lost_ends_the_step(components: Any, recipe: MakeRecipe) -> None:
    components.engine.losses = [EngineUnavailable("no server is left")]
    with pytest.raises(EngineUnavailable, match="no server is left"):
        run(recipe(), components)


class CountingEngine(Engine):
    """Counts its work: 3 tokens a prompt, once, and those of its responses."""

    def generate(self, prompts: Sequence[Prompt], n: int, **keywords: Any) -> list[Rollout]:
        rollouts = super().generate(prompts, n, **keywords)
        self.work = GenerationWork(
            prompt_tokens=3 * len(prompts),
            prompt_tokens_saved=3 * (n - 1) * len(prompts),
            decoded_tokens=sum(len(rollout.response_ids) for rollout in rollouts),
            patches=len(prompts),
            patches_saved=2 * len(prompts),
        )
        return rollouts


def test_the_work_of_generation_is_summed_over_rounds(components: Any, recipe: MakeRecipe) -> None:
    components.engine = CountingEngine()
    work = {name: value for name, value in run(recipe(DYNAMIC), components).metrics.items() if "work" in name}
    assert len(components.engine.asked) == 3
    assert work == {
        "work/rollout_prompt_tokens": 24.0, "work/rollout_prompt_tokens_saved": 72.0,
        "work/rollout_decoded_tokens": 80.0, "work/rollout_patches": 8.0, "work/rollout_patches_saved": 16.0,
    }  # fmt: skip


class BothWays(Engine):
    """Answers sampled and greedily in one call, if it is asked to."""

    def generate(
        self, prompts: Sequence[Prompt], n: int, *, and_greedily: bool = False, **keywords: Any
    ) -> list[Rollout]:
        rollouts = super().generate(prompts, n, **keywords)
        if and_greedily:
            rollouts += super().generate(prompts, 1, **{**keywords, "sampling": keywords["sampling"].greedily})
        return rollouts


@pytest.mark.parametrize("engine", [Engine, BothWays])
def test_both_ways_of_validation_are_told_apart_in_one_call_or_two(components: Any, engine: type[Engine]) -> None:
    answering = engine()
    asked: list[bool] = []
    generate = answering.generate

    def noted(prompts: Sequence[Prompt], n: int, **keywords: Any) -> list[Rollout]:
        asked.append("and_greedily" in keywords)
        return generate(prompts, n, **keywords)

    noted.__signature__ = inspect.signature(generate)  # type: ignore[attr-defined]
    answering.generate = noted  # type: ignore[method-assign]
    sampling = Sampling(temperature=0.5, top_p=0.9, stop_strings=("x",))
    prompts = [prompt(number) for number in range(3)]
    both = answers_both_ways(answering, components.policy, prompts, sampling=sampling, seed=4)
    assert asked == ([True] if engine is BothWays else [False, False])
    assert answering.samplings == [sampling, Sampling(temperature=0.0, stop_strings=("x",))]
    for rollouts in both:
        assert [rollout.prompt.key for rollout in rollouts] == ["0", "1", "2"]
        assert [rollout.group_id for rollout in rollouts] == [0, 1, 2]
