# SPDX-License-Identifier: Apache-2.0
"""Claim: the sides of ``benchmarks/step`` do the same work: one step of each, and equal losses and gradients.

TRL's is not among them: it is not installed here, and it samples with a generator of its own.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.step import ours, report, workload
from benchmarks.step.floor import Side as Floor
from benchmarks.step.run import Results, SideFailed, check_work, run
from benchmarks.step.sizes import FLOOR, OURS, OURS_UNSHARED, TINY, Job
from megatron_g2rpo.data.packing import PackSequence
from megatron_g2rpo.train.step.losses import G2RPOLoss, TaskEntropies, entropy_bounds
from tests.common.compare import relative_distance

SIDES = (OURS, OURS_UNSHARED, FLOOR)
# fp32: sums over tokens in other orders, through three layers of vision and four of language.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench-step")


def test_sides_take_turns_and_a_second_run_takes_no_step_again(directory: Path) -> None:
    job = Job(size=TINY, sides=SIDES, steps=1)
    run([job], directory, 1, write=report.write)
    results = Results(directory / "results.jsonl")
    assert [(record["side"], record["warm_up"]) for record in results.records] == [
        (side, warm_up) for warm_up in (True, False) for side in SIDES
    ]
    for record in results.records:
        check_work(record, record["side"], TINY)
        phases = sum(record["phases"].values())
        assert 0 < phases <= record["cpu"] * 1.001, "phases are parts of the step"
        assert {"generation", "update"} <= record["phases"].keys()
    text = (directory / "results.jsonl").read_text()
    run([job], directory, 1, write=report.write)
    assert (directory / "results.jsonl").read_text() == text


def test_other_work_and_a_parameter_without_a_gradient_are_refused() -> None:
    right = {"rollouts": 6, "prompt_tokens": 36, "answer_tokens": 30, "updates": 1, "images": 2}
    check_work({"work": right, "untrained": []}, OURS, TINY)
    for name in right:
        with pytest.raises(SideFailed, match=r"ours at tiny did \{.*not \{"):
            check_work({"work": {**right, name: right[name] - 1}, "untrained": []}, OURS, TINY)
    with pytest.raises(SideFailed, match="no gradient for visual"):
        check_work({"work": right, "untrained": ["visual"]}, OURS, TINY)


def test_losses_and_gradients_are_equal_on_the_same_rollouts(directory: Path) -> None:
    floor = Floor(TINY, directory)
    batch = floor.processed(0)
    generator = torch.Generator().manual_seed(0)
    answers = torch.randint(400, (TINY.rollouts, TINY.answer_tokens), generator=generator)
    advantages = torch.randn(TINY.rollouts, generator=generator)
    loss = floor.loss(batch, answers, advantages)
    loss.backward()
    right = {name: p.grad.clone() for name, p in floor.model.named_parameters()}
    sides = {shared: _ours(directory, answers, advantages, shared=shared) for shared in (True, False)}
    for shared, (value, gradients) in sides.items():
        assert value == pytest.approx(float(loss), abs=TOLERANCE), shared
        assert gradients.keys() == right.keys()
        scale = torch.stack([gradient.norm() for gradient in right.values()]).norm()
        for name, gradient in gradients.items():
            # The vision tower's key biases have none but for rounding: held against the whole gradient.
            small = right[name].norm() < 1e-6 * scale
            error = relative_distance(gradient, right[name], scale * 1e-3 if small else None)
            assert error < TOLERANCE, f"shared={shared}, {name}: {error}"
    # Negative: an answer's advantage on its sibling is seen.
    advantages[[0, 1]] = advantages[[1, 0]]
    _, gradients = _ours(directory, answers, advantages, shared=True)
    whole = [torch.cat([g[name].flatten() for name in right]) for g in (gradients, right)]
    assert relative_distance(*whole) > 100 * TOLERANCE


def _ours(directory: Path, answers: Tensor, advantages: Tensor, *, shared: bool) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients by name of our policy on these answers to the first step's prompts."""
    side = ours.Side(TINY, directory, shared=shared)
    recipe, parts = side.recipe, side.components
    prompts = [parts.processor.encode(_chat(number), [workload.image(TINY, number)]) for number in range(TINY.prompts)]
    sequences = [
        PackSequence(
            inputs=prompts[number // TINY.samples],
            response_ids=answer,
            advantage=advantage,
            behaviour_logprobs=torch.zeros(len(answer)),
        )
        for number, (answer, advantage) in enumerate(zip(answers, advantages.tolist(), strict=True))
    ]
    batches = parts.packer.pack(sequences, recipe.policy.sequence_packing.train_mb_tokens)
    stats = parts.policy.logprobs(batches)
    batches = [replace(batch, old_logprobs=each.logprobs) for batch, each in zip(batches, stats, strict=True)]
    entropies = TaskEntropies.of(batches, stats, len(parts.tasks), parts.policy.groups.data)
    bounds = entropy_bounds(recipe.env, parts.tasks)
    loss = G2RPOLoss(recipe.loss_fn, bounds, parts.tasks, entropies, parts.policy.groups.context)
    value = parts.policy.gradients(batches, loss)["loss"]
    gradients = parts.policy.stream(tensor_of=lambda parameter: parameter.main_grad)  # type: ignore[attr-defined]
    return value, {name: gradient.clone() for name, gradient in gradients}


def _chat(number: int) -> list[dict[str, Any]]:
    content = [{"type": "image"}, {"type": "text", "text": workload.question(TINY, number)}]
    return [{"role": "user", "content": content}]
