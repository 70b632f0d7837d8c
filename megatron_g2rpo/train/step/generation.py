# SPDX-License-Identifier: Apache-2.0
"""Generation over ranks: every process answers a share of its replica's prompts, and the replica exchanges them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch.distributed as dist

from megatron_g2rpo.collectives import together
from megatron_g2rpo.policy.megatron import MegatronPolicy
from megatron_g2rpo.rollout.base import (
    Engine,
    EngineUnavailable,
    OnFinished,
    Sampling,
    takes_and_greedily,
    takes_on_finished,
)
from megatron_g2rpo.train.run.stopping import SamplingStopped, Stopping
from megatron_g2rpo.types import Prompt, Rollout
from megatron_g2rpo.weights import WeightSource


class HasWeights(Protocol):
    """What a lost engine is given its weights from again: a policy, or a model directory that is evaluated."""

    def source(self) -> WeightSource:
        """Return the weights in the form that a rollout engine loads. A collective of all ranks."""
        ...


def generate(
    engine: Engine,
    policy: MegatronPolicy,
    prompts: Sequence[Prompt],
    n: int,
    *,
    sampling: Sampling,
    seed: int,
    group_ids: Sequence[int],
    on_finished: OnFinished | None = None,
    stopping: Stopping | None = None,
) -> list[Rollout]:
    """Responses to the prompts of this data-parallel rank, the same list on each of its model-parallel ranks.

    Each model-parallel rank runs the engine on every ``model_size``-th prompt, and only tokens travel: prompts are
    known to all. What is sampled depends neither on the number of ranks of a replica nor on the number of replicas
    (see ``Engine.generate``). A collective of all ranks.

    Args:
        engine: the rollout engine, which has the policy's current weights.
        policy: whose layout says which prompts are this rank's, and whose weights a lost engine is given again.
        prompts: the prompts of this data-parallel rank.
        n: responses per prompt.
        sampling: the distribution to sample from, and text that ends a response.
        seed: seed of every random draw.
        group_ids: one per prompt, unique over all ranks.
        on_finished: function that is called with rollouts as soon as they are there, where the engine can say so and
            this rank samples all of its replica's; what it was given may not be returned, if the engine was lost.
        stopping: see ``answers``.

    Returns:
        Rollouts ordered by prompt, then sample.

    Raises:
        EngineUnavailable, SamplingStopped: see ``answers``.
    """
    groups = policy.groups
    share = range(groups.model_rank, len(prompts), groups.model_size)
    mine = answers(
        engine,
        policy,
        [prompts[index] for index in share],
        n,
        sampling=sampling,
        seed=seed,
        group_ids=[group_ids[index] for index in share],
        on_finished=on_finished if groups.model_size == 1 else None,
        stopping=stopping,
    )
    if groups.model_size == 1:
        return mine
    # Without the prompt, whose pixels would dominate the message.
    light = [replace(rollout, prompt=None) for rollout in mine]  # type: ignore[arg-type]
    gathered: list[list[Rollout]] = [[] for _ in range(groups.model_size)]
    dist.all_gather_object(gathered, light, group=groups.model)
    prompt_of = dict(zip(group_ids, prompts, strict=True))
    everything = [replace(rollout, prompt=prompt_of[rollout.group_id]) for share in gathered for rollout in share]
    place = {group_id: position for position, group_id in enumerate(group_ids)}
    return sorted(everything, key=lambda rollout: (place[rollout.group_id], rollout.sample_index))


def answers_both_ways(
    engine: Engine,
    policy: HasWeights,
    prompts: Sequence[Prompt],
    *,
    sampling: Sampling,
    seed: int,
    stopping: Stopping | None = None,
) -> tuple[list[Rollout], list[Rollout]]:
    """One sampled and one greedy response to each prompt, in one call where the engine can. A collective of all ranks.

    Args:
        engine, policy, prompts, sampling, seed, stopping: see ``answers``.

    Raises:
        EngineUnavailable, SamplingStopped: see ``answers``.
    """
    group_ids = range(len(prompts))

    def ask(sampling: Sampling, *, and_greedily: bool) -> list[Rollout]:
        return answers(
            engine,
            policy,
            prompts,
            1,
            sampling=sampling,
            seed=seed,
            group_ids=group_ids,
            stopping=stopping,
            and_greedily=and_greedily,
        )

    if takes_and_greedily(engine):
        both = ask(sampling, and_greedily=True)
        return both[: len(prompts)], both[len(prompts) :]
    return ask(sampling, and_greedily=False), ask(sampling.greedily, and_greedily=False)


def answers(
    engine: Engine,
    policy: HasWeights,
    prompts: Sequence[Prompt],
    n: int,
    *,
    sampling: Sampling,
    seed: int,
    group_ids: Sequence[int],
    on_finished: OnFinished | None = None,
    stopping: Stopping | None = None,
    and_greedily: bool = False,
) -> list[Rollout]:
    """What the engine answers to this process's prompts; see ``Engine.generate``. A collective of all ranks.

    Where an engine that may be waited for was lost, it is given the policy's weights again, which waits for it, and all
    ranks ask anew: what is sampled is the same.

    Args:
        engine, policy, prompts, n, sampling, seed, group_ids, on_finished: see ``generate``.
        stopping: whether to give up rollouts that are under way, where a rank is asked to stop; None: never.
        and_greedily: whether a greedy response to each prompt follows; for an engine that takes this keyword.

    Raises:
        EngineUnavailable: on every rank, if the engine was lost on any, so that none waits for another in a collective.
        SamplingStopped: on every rank, if any gave up its rollouts.
        RuntimeError: the engine did not return what was kept, where that was asked for.
    """
    heard = _Heard(stopping, on_finished, len(prompts) * (n + and_greedily))
    early: dict[str, Any] = {"and_greedily": True} if and_greedily else {}
    if takes_on_finished(engine) and (on_finished is not None or stopping is not None):
        early["on_finished"] = heard

    def ask() -> list[Rollout]:
        try:
            heard.begin()
            return engine.generate(prompts, n, sampling=sampling, seed=seed, group_ids=group_ids, **early)
        except _GivenUp:
            return []

    while True:
        try:
            rollouts = together(ask, errors=(EngineUnavailable,))
            break
        except EngineUnavailable as error:
            if not error.wait:
                raise
        _raise_if_stopped(stopping, heard.gave_up)
        engine.load_weights(policy.source())
    _raise_if_stopped(stopping, heard.gave_up)
    if sampling.return_kept and any(rollout.kept_ids is None for rollout in rollouts):
        raise RuntimeError(
            f"{type(engine).__name__} filters by policy.generation.top_k, but its rollouts do not say what it kept "
            "(Rollout.kept_ids): the trainer's log-probabilities would be those of another distribution"
        )
    return rollouts


class _GivenUp(Exception):
    """This rank was asked to stop while it sampled."""


class _Heard:
    """Called with rollouts as they are finished: hands them on, unless the rank was asked to stop before the last.

    Args:
        stopping: see ``answers``.
        on_finished: see ``answers``.
        total: number of rollouts that are asked for.
    """

    def __init__(self, stopping: Stopping | None, on_finished: OnFinished | None, total: int) -> None:
        self._stopping, self._on_finished, self._total = stopping, on_finished, total
        self._done = 0
        self.gave_up = False

    def begin(self) -> None:
        """Begin to sample, or to sample anew."""
        self._done, self.gave_up = 0, False
        self._give_up_if_asked()

    def __call__(self, rollouts: Sequence[Rollout]) -> None:
        self._done += len(rollouts)
        if self._on_finished is not None:
            self._on_finished(rollouts)
        if self._done < self._total:
            self._give_up_if_asked()

    def _give_up_if_asked(self) -> None:
        if self._stopping is not None and self._stopping.asked():
            self.gave_up = True
            raise _GivenUp


def _raise_if_stopped(stopping: Stopping | None, gave_up: bool) -> None:
    """Raise on every rank if one gave up its rollouts; a rank that was asked later has no say: the step goes on."""
    if stopping is None:
        return
    reason = stopping.agreed(only_if=gave_up)
    if reason is not None:
        raise SamplingStopped(reason)
