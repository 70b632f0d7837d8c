# SPDX-License-Identifier: Apache-2.0
"""Answers to look at: a sampled and a greedy one of each task at a validation, from whichever rank has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch.distributed as dist

from megatron_g2rpo.types import Rewards, Rollout

Kind = Literal["sampled", "greedy"]
# Characters of a text that travel between ranks and are kept; of a longer one, both ends.
LONGEST_TEXT = 20_000
# Characters of a response on the console.
SHOWN_CHARACTERS = 600


@dataclass(frozen=True, kw_only=True)
class Example:
    """One answer of a validation, as text.

    Attributes:
        task: its task.
        key: key of the sample in its dataset.
        kind: how it was decoded.
        reward: its total reward; None where that could not be computed.
        question: the sample's question.
        response: what the policy answered.
        reference: the sample's answer.
    """

    task: str
    key: str
    kind: Kind
    reward: float | None
    question: str
    response: str
    reference: str

    @property
    def line(self) -> str:
        """The answer on one line of the console, with what it is an answer to."""
        reward = "failed" if self.reward is None else f"{self.reward:.3f}"
        answer = f"{shortened(self.question)!r} -> {shortened(self.response)!r} (reference {self.reference!r})"
        return f"  {self.task} {self.key}, {self.kind}, reward {reward}: {answer}"

    def row(self) -> dict[str, Any]:
        """Return the answer as a row of a table, plain values by column."""
        return asdict(self)


def shortened(text: str, limit: int = SHOWN_CHARACTERS) -> str:
    """Return a text, of a long one both ends."""
    return text if len(text) <= limit else f"{text[: limit // 2]} [...] {text[-(limit // 2) :]}"


def first_of_each_task(rollouts: Sequence[Rollout], rewards: Rewards, kind: Kind) -> list[Example]:
    """Return the first answer of each task, over all ranks in their order. A collective of all ranks.

    Args:
        rollouts: this rank's answers.
        rewards: their rewards.
        kind: how they were decoded.
    """
    mine: dict[str, Example] = {}
    for index, rollout in enumerate(rollouts):
        sample = rollout.prompt.sample
        if sample.task not in mine:
            mine[sample.task] = Example(
                task=sample.task,
                key=rollout.prompt.key,
                kind=kind,
                reward=None if bool(rewards.failed[index]) else float(rewards.total[index]),
                question=shortened(sample.question, LONGEST_TEXT),
                response=shortened(rollout.text, LONGEST_TEXT),
                reference=shortened(str(sample.answer), LONGEST_TEXT),
            )
    everyone: list[dict[str, Example]] = [mine] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    found: dict[str, Example] = {}
    for theirs in everyone:
        found = {**theirs, **found}
    return [found[task] for task in sorted(found)]


def in_turn(examples: Sequence[Example], number: int, turn: int) -> list[Example]:
    """Return the answers to show at a validation: every task has its turn, greedily, then sampled.

    Args:
        examples: those that there are.
        number: number of answers to show at each validation.
        turn: number of validations before this one.
    """
    tasks = sorted({example.task for example in examples})
    by_kind = {(example.kind, example.task): example for example in examples}
    order = [by_kind[kind, task] for kind in ("greedy", "sampled") for task in tasks if (kind, task) in by_kind]
    shown = min(number, len(order))
    return [order[(turn * number + index) % len(order)] for index in range(shown)]
