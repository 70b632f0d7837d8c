# SPDX-License-Identifier: Apache-2.0
"""Rewards over ranks: computed once a replica; those that could not be are counted, named, and not too many."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch.distributed as dist

from megatron_g2rpo.collectives import from_first, gather, on_all_ranks
from megatron_g2rpo.recipe import Recipe, TrainRecipe
from megatron_g2rpo.tasks.scoring import SHOWN_FAILURES, RewardError, Scoring, failures_message
from megatron_g2rpo.tasks.workers import RewardWorkers
from megatron_g2rpo.types import FailedReward, Rewards, Rollout


def scoring_of(recipe: Recipe, workers: RewardWorkers | None, *, overlong_weight: float | None = None) -> Scoring:
    """Return what scores rollouts as a recipe says.

    Args:
        recipe: the run's recipe.
        workers: processes that reward parts run in; None: this process.
        overlong_weight: weight of the penalty of long responses; None: none is added.
    """
    return Scoring(
        recipe.env,
        response_format=recipe.data.response_format,
        max_response_tokens=recipe.policy.generation.max_new_tokens,
        overlong_buffer=recipe.grpo.overlong_penalty.buffer if isinstance(recipe, TrainRecipe) else None,
        overlong_weight=overlong_weight,
        workers=workers,
        on_bad_sample=recipe.data.on_bad_sample,
    )


@dataclass(frozen=True)
class FailedRewards:
    """The rollouts of all ranks that were scored, and why some of them have no reward.

    Attributes:
        scored: number of rollouts that were scored.
        failures: why there is no reward, for each rollout without one, in the order of ranks.
    """

    scored: int = 0
    failures: tuple[FailedReward, ...] = ()

    def __add__(self, other: FailedRewards) -> FailedRewards:
        return FailedRewards(self.scored + other.scored, self.failures + other.failures)

    def check(self, limit: float) -> None:
        """Refuse to go on with too few rewards.

        Args:
            limit: the recipe's ``env.max_failed_rewards``.

        Raises:
            RewardError: a larger share failed; names the first.
        """
        if len(self.failures) > limit * self.scored:
            what = (
                f"{len(self.failures)} of {self.scored} rewards, more than env.max_failed_rewards ({limit:g}) allows,"
            )
            raise on_all_ranks(RewardError(failures_message(self.failures, what)))

    def most(self, limit: float, coming: int) -> int:
        """Return how many of the rollouts to come may fail; a rank with more failures of its own need not go on.

        Args:
            limit: the recipe's ``env.max_failed_rewards``.
            coming: number of rollouts of all ranks that are scored next.
        """
        return math.floor(limit * (self.scored + coming)) - len(self.failures)

    def metrics(self, prefix: str) -> dict[str, float]:
        """Return ``<prefix>``, how many failed, and ``<prefix>/<part>`` for each part that did.

        Args:
            prefix: name of the metric.
        """
        parts = [failure.part for failure in self.failures]
        by_part = {f"{prefix}/{part}": float(parts.count(part)) for part in sorted(set(parts))}
        return {prefix: float(len(parts)), **by_part}

    def lines(self, consequence: str) -> list[str]:
        """Return lines for the console: how many failed, and the first of them; none where none did.

        Args:
            consequence: what becomes of the rollouts, the end of a sentence.
        """
        if not self.failures:
            return []
        shown = [f"  {failure.message}" for failure in self.failures[:SHOWN_FAILURES]]
        return [f"warning: {len(self.failures)} of {self.scored} rewards failed; {consequence}. The first:", *shown]


def scored(
    scoring: Scoring,
    rollouts: Sequence[Rollout],
    *,
    replica: dist.ProcessGroup | None,
    between: dist.ProcessGroup | None,
    most_failures: int | None = None,
) -> tuple[Rewards, FailedRewards]:
    """Score this rank's rollouts, and say of all ranks' what failed. A collective of both groups.

    Args:
        scoring: what scores.
        rollouts: this rank's rollouts.
        replica: ranks that have the same rollouts, which are scored once, by the first of them: a judge model may say
            something else when it is asked again. None: no other rank has these rollouts.
        between: ranks that have other rollouts; None for all ranks.
        most_failures: see ``Scoring.rewards``.

    Raises:
        RewardError: see ``Scoring.rewards``; raised on every rank.
    """
    mine: list[Rewards] = []

    def compute() -> tuple[int, tuple[FailedReward, ...]]:
        once = partial(scoring.rewards, rollouts, most_failures=most_failures)
        mine.append(once() if replica is None else from_first(once, group=replica))
        return len(rollouts), tuple(mine[0].failures.values())

    try:
        shares = gather(compute, between)
    except RewardError as error:
        on_all_ranks(error)  # each rank of a replica has it, and has given it to one of every other replica
        raise
    failures = tuple(failure for _, failures in shares for failure in failures)
    return mine[0], FailedRewards(sum(count for count, _ in shares), failures)
