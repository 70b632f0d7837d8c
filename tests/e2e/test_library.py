# SPDX-License-Identifier: Apache-2.0
"""Claim: in TRL's trainer, examples/library puts G2RPO's advantages into the loss, on one process and on two.

It needs TRL, which `make test-full` installs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_g2rpo.objective import gaussian_advantages
from tests.common.launch import ROOT, torchrun
from tests.e2e import library_worker

pytestmark = pytest.mark.full

STEPS, ROLLOUTS, GROUP = 2, 32, 8  # rollouts of a step and process, and of a prompt

Record = dict[str, Any]
Row = tuple[str, tuple[int, ...]]


def run(directory: Path, nproc: int) -> list[Record]:
    """What every rank recorded."""
    directory.mkdir()
    torchrun(nproc, str(ROOT / "tests" / "e2e" / "library_worker.py"), str(directory), str(STEPS))
    return [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(nproc)]


@pytest.fixture(scope="module", params=[1, 2], ids=["one process", "two processes"])
def records(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Record]:
    return run(tmp_path_factory.mktemp("library") / "run", request.param)


def rewarded(records: list[Record], step: int) -> list[Record]:
    """The rollouts of all ranks in a step, in rank order."""
    rows = [row for record in records for row in record["rewarded"][step * ROLLOUTS : (step + 1) * ROLLOUTS]]
    assert len(rows) == ROLLOUTS * len(records)
    return rows


def expected(rows: list[Record]) -> tuple[Tensor, Tensor]:
    """Our advantages and TRL's, float64 ``[N]``, from the recorded rewards; a group is a prompt."""
    rewards = torch.tensor([row["reward"] for row in rows], dtype=torch.float64)
    prompts = [row["prompt"] for row in rows]
    groups = torch.tensor([prompts.index(prompt) for prompt in prompts])
    ours = gaussian_advantages(rewards, groups, torch.tensor([row["task"] == "near" for row in rows]).long())
    theirs = torch.empty_like(rewards)
    for group in groups.unique():
        of_group = rewards[groups == group]
        assert len(of_group) == GROUP
        theirs[groups == group] = (of_group - of_group.mean()) / (of_group.std() + 1e-4)
    return ours, theirs


def in_loss(records: list[Record], step: int) -> dict[Row, float]:
    """The advantage of every rollout that the losses of a step were given, on any rank."""
    losses = [loss for record in records for loss in record["losses"] if loss["step"] == step]
    rows = [row for loss in losses for row in zip(loss["prompts"], loss["ids"], loss["advantages"], strict=True)]
    assert len(rows) == ROLLOUTS * len(records)
    return {(prompt, tuple(ids)): advantage for prompt, ids, advantage in rows}


@pytest.mark.parametrize("step", range(STEPS))
def test_the_loss_is_given_our_advantages_and_not_trls(records: list[Record], step: int) -> None:
    rows = rewarded(records, step)
    ours, theirs = expected(rows)
    assert {row["task"] for row in rows} == {"near", "even"}
    given = in_loss(records, step)
    used = torch.tensor([given[row["prompt"], tuple(row["ids"])] for row in rows], dtype=torch.float64)
    assert torch.equal(used, ours.float().double()), "the loss works in float32"
    assert (used - theirs).abs().max() > 0.1


def test_the_table_of_completions_shows_the_advantages_of_the_last_step(records: list[Record]) -> None:
    ours, _ = expected(rewarded(records, STEPS - 1))
    for record in records:
        assert record["logged"] == ours.float().tolist()


def test_two_runs_are_equal(records: list[Record], tmp_path: Path) -> None:
    assert run(tmp_path / "again", len(records)) == records


def test_what_has_no_g2rpo_advantage_is_refused(tmp_path: Path) -> None:
    example = library_worker.load_example()

    def sometimes_none(completions: list[str], **_: Any) -> list[float | None]:
        return [None, *[0.0] * (len(completions) - 1)]

    with pytest.raises(ValueError, match="multi_objective_aggregation must be 'sum_then_normalize'"):
        example.make_trainer(str(tmp_path), steps=1, multi_objective_aggregation="normalize_then_sum")
    trainer = example.make_trainer(str(tmp_path), steps=1, reward_function=sometimes_none)
    with pytest.raises(ValueError, match=r"reward .* is nan"):
        trainer.train()
