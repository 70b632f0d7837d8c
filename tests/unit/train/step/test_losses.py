# SPDX-License-Identifier: Apache-2.0
"""Claims: the loss that the policy takes is the plain formula, however its sequences are packed; tasks add up to it.

In one process; ``tests/parallel/test_objective_layouts.py`` is the same over ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_g2rpo.data.packing import PackSequence
from megatron_g2rpo.policy.device import select
from megatron_g2rpo.policy.megatron import MegatronPolicy
from megatron_g2rpo.recipe import TrainRecipe
from megatron_g2rpo.train.step.losses import TaskEntropies
from megatron_g2rpo.types import PackedBatch
from tests.common.compare import largest_distance
from tests.common.objective_parity import (
    OBJECTIVES,
    TASK_NAMES,
    Fixed,
    gradients,
    load_model,
    loss_on,
    objective,
    oracle,
    with_fixed,
)
from tests.common.parity import TASKS, TEMPERATURE, packer_for, parity_sequences
from tests.common.policy_layout import layout_options
from tests.common.tiny_model import make_tiny_qwen3vl

# float32 sums in another order.
TOLERANCE = 1e-5


@dataclass
class Scene:
    directory: Path
    policy: MegatronPolicy
    sequences: list[PackSequence]

    def rows(self, recipe: TrainRecipe, fixed: Sequence[Fixed], *, alone: bool) -> list[PackedBatch]:
        """One micro-batch with everything, or one a sequence."""
        packer = packer_for(self.policy.hf_config, self.policy.layout)
        groups = [[i] for i in range(len(self.sequences))] if alone else [list(range(len(self.sequences)))]
        rows = []
        for members in groups:
            (row,) = packer.pack([self.sequences[i] for i in members], budget=10_000)
            rows.append(
                with_fixed(replace(row, sequence_ids=torch.tensor([*members, -1])[row.sequence_ids]), fixed, recipe)
            )
        return rows


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    directory = tmp_path_factory.mktemp("objective")
    make_tiny_qwen3vl(directory, layers=2, vision_depth=2, deepstack=(0,), vocab=161, seed=1)
    policy = MegatronPolicy(layout_options(directory), select("cpu"), seed=0, max_steps=10)
    return Scene(directory, policy, parity_sequences(policy.hf_config))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_gradient_is_that_of_the_plain_formula_however_rows_are_packed(scene: Scene, name: str) -> None:
    recipe = objective(name)
    expected, fixed = oracle(load_model(scene.directory), scene.sequences, recipe)
    for alone in (False, True):
        rows = scene.rows(recipe, fixed, alone=alone)
        assert len(rows) == (len(scene.sequences) if alone else 1)
        ours = gradients(scene.policy, rows, loss_on(scene.policy, rows, recipe))
        assert largest_distance(ours, expected) <= TOLERANCE


def test_the_formula_has_all_its_parts(scene: Scene) -> None:
    """Clips, masks and truncation are at work in the comparison above, and some tokens escape each."""
    for name in OBJECTIVES:
        recipe = objective(name)
        _, fixed = oracle(load_model(scene.directory), scene.sequences, recipe)
        (row,) = scene.rows(recipe, fixed, alone=False)
        metrics = scene.policy.gradient_norm([row], loss_on(scene.policy, [row], recipe), TEMPERATURE)
        if not name.startswith("sapo"):
            clipped = metrics["clipped_low"] + metrics["clipped_high"] + metrics["clipped_dual"]
            assert 0.0 < clipped < 1.0, name
        if row.importance_weights is not None:
            counted = row.importance_weights[row.loss_mask != 0]
            assert len(counted.unique()) > 1, name
            assert ("masked" in name) == bool((counted == 0).any())


@pytest.mark.parametrize("name", ["ppo, k3", "gspo, k2, masked"])
def test_the_tasks_parts_add_up_to_the_whole(scene: Scene, name: str) -> None:
    recipe = objective(name)
    _, fixed = oracle(load_model(scene.directory), scene.sequences, recipe)
    rows = scene.rows(recipe, fixed, alone=True)
    loss = loss_on(scene.policy, rows, recipe)
    whole = gradients(scene.policy, rows, loss)
    parts = [gradients(scene.policy, rows, loss.of_task(task)) for task in range(TASKS)]
    assert all(largest_distance(part, whole) > 0.1 for part in parts), "each task should contribute"
    assert largest_distance({key: sum(part[key] for part in parts) for key in whole}, whole) <= TOLERANCE  # type: ignore[misc]
    assert largest_distance(gradients(scene.policy, rows, loss), whole) == 0.0, (
        "measuring a part must not change the whole"
    )


def test_metrics_of_a_task_are_means_over_its_tokens(scene: Scene) -> None:
    recipe = objective("ppo, k3")
    _, fixed = oracle(load_model(scene.directory), scene.sequences, recipe)
    rows = scene.rows(recipe, fixed, alone=True)
    loss = loss_on(scene.policy, rows, recipe)
    raw = scene.policy.gradient_norm(rows, loss, TEMPERATURE)
    metrics = loss.metrics(raw)
    tokens: Tensor = torch.zeros(TASKS)
    for row in rows:
        for task in range(TASKS):
            tokens[task] += float((row.loss_mask * (row.task_ids == task)).sum())
    clips = raw["clipped_low"] + raw["clipped_high"] + raw["clipped_dual"]
    by_task = sum(metrics[f"{task}/clipped"] * float(tokens[i]) for i, task in enumerate(TASK_NAMES))
    # The dual clip and the upper clip exclude each other: the sums count each token once.
    assert by_task == pytest.approx(clips * float(tokens.sum()), rel=1e-6)
    assert raw["reference_kl"] > 0.0


def test_an_absent_task_is_silent(scene: Scene) -> None:
    """No metric, no gradient, nothing that is not a number."""
    recipe = objective("ppo, k3")
    _, fixed = oracle(load_model(scene.directory), scene.sequences, recipe)
    present = [row for row in scene.rows(recipe, fixed, alone=True) if not bool((row.task_ids == 1).any())]
    loss = loss_on(scene.policy, present, recipe)
    assert loss.known_term.sides.tolist() == [1, 0]
    metrics = loss.metrics(scene.policy.gradient_norm(present, loss, TEMPERATURE))
    assert "b/clipped" not in metrics
    assert all(value == value for value in metrics.values())
    silent = gradients(scene.policy, present, loss.of_task(1))
    assert all(float(gradient.abs().max()) == 0.0 for gradient in silent.values())


def test_counts_of_a_masked_sequence_do_not_shape_the_entropy(scene: Scene) -> None:
    """The sequence that is kept out of the loss has no say in its task's mean entropy either."""
    recipe = objective("ppo, k3")
    _, fixed = oracle(load_model(scene.directory), scene.sequences, recipe)
    rows = scene.rows(recipe, fixed, alone=True)
    stats = scene.policy.logprobs(rows, TEMPERATURE)
    entropies = TaskEntropies.of(rows, stats, TASKS, scene.policy.groups.data)
    counted = [len(sequence.response_ids) for sequence in scene.sequences if sequence.in_loss]
    assert float(entropies.counts.sum()) == sum(counted) < sum(len(s.response_ids) for s in scene.sequences)
