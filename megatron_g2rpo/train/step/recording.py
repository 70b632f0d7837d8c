# SPDX-License-Identifier: Apache-2.0
"""The rollouts of a step as rows of a record (``records``), gathered from the data-parallel ranks to one that writes.

``begin`` comes before the step's updates, with all that is known then, ``finish`` after them: what fails in between, and
however, has left a record that can be replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_g2rpo import recipe as recipes
from megatron_g2rpo.collectives import from_first
from megatron_g2rpo.data.packing import response_values
from megatron_g2rpo.data.processing import ChatProcessor
from megatron_g2rpo.policy.process_groups import ParallelGroups
from megatron_g2rpo.recipe import TrainRecipe
from megatron_g2rpo.records.schema import AFTER_UPDATE, REWARD_PREFIX, Header, storable
from megatron_g2rpo.records.writing import RolloutWriter, drop_after, table_of
from megatron_g2rpo.tasks.scoring import OVERLONG, read
from megatron_g2rpo.train.run.owners import run_id
from megatron_g2rpo.train.step.minibatches import Minibatch
from megatron_g2rpo.types import FailedReward, Prompt, Rewards, Rollout

# Why a rollout is left out of the loss.
NO_REWARD, RATIO = "no reward", "ratio"


class Recording:
    """Records the rollouts of a run's steps. Made by every rank; a collective, as are ``begin`` and ``finish``.

    Args:
        recipe: the run's recipe.
        groups: this rank's place in the layout.
        processor: decodes prompts.
        first_step: the step that the run goes on from: the records of later ones are removed.
        note: shows the user a line.

    Raises:
        OSError: a record of a step that is taken again cannot be removed.
    """

    def __init__(
        self,
        recipe: TrainRecipe,
        groups: ParallelGroups,
        processor: ChatProcessor,
        first_step: int,
        note: Callable[[str], None],
    ) -> None:
        self._recipe, self._groups, self._processor = recipe, groups, processor
        run, options = Path(recipe.logger.log_dir), recipe.logger.rollouts
        self._run_id = from_first(lambda: run_id(run))
        from_first(lambda: drop_after(run, first_step))
        self._rollouts: Sequence[Rollout] = ()
        self._writer = RolloutWriter(
            run, period=options.period, budget_mb=options.budget_mb, last_step=recipe.grpo.max_num_steps, note=note
        )

    def begin(
        self,
        step: int,
        rollouts: Sequence[Rollout],
        rewards: Rewards,
        advantages: Tensor,
        minibatches: Sequence[Minibatch],
        seconds: float,
    ) -> None:
        """Record a step whose updates are about to be taken. A collective of all ranks.

        Args:
            step: number of the step, from 1.
            rollouts: this data-parallel rank's rollouts.
            rewards: their rewards.
            advantages: float64 ``[N]``, their advantages.
            minibatches: the rollouts, packed.
            seconds: time that it took to generate them.
        """
        self._rollouts = rollouts
        parts = tuple(rewards.parts)

        def make() -> pa.Table:
            shared = {
                "step": step,
                "weights_version": step - 1,
                "data_rank": self._groups.data_rank,
                "engine": self._recipe.policy.generation.backend,
                "seconds": seconds,
            }
            rows = rollout_rows(self._recipe, self._processor, rollouts, rewards, advantages, minibatches)
            return table_of([{**row, **shared} for row in rows], parts)

        table = self._gathered(make)
        if table is None:
            return
        header = Header(
            run_id=self._run_id,
            release=version("megatron-g2rpo"),
            recipe=recipes.fingerprint(self._recipe),
            step=step,
            rollouts=table.num_rows,
            data_ranks=self._groups.data_size,
            parts=parts,
        )
        self._writer.begin(table, header)

    def finish(self, minibatches: Sequence[Minibatch]) -> None:
        """Complete the step's record after its updates. A collective of all ranks.

        Args:
            minibatches: the step's rollouts, packed, with their log-probabilities and entropies.
        """
        rollouts, self._rollouts = self._rollouts, ()
        table = self._gathered(lambda: _known_after(self._recipe, rollouts, minibatches))
        if table is not None:
            self._writer.finish(table)

    def _gathered(self, make: Callable[[], pa.Table]) -> pa.Table | None:
        """Rows of all data-parallel ranks on the first rank, in the order of groups and samples; None elsewhere."""
        groups = self._groups
        if groups.model_rank:  # whose rollouts another rank of its replica has, too
            return None
        mine = make()
        if groups.data_size == 1:
            return mine
        tables: list[Any] | None = [None] * groups.data_size if groups.data_rank == 0 else None
        dist.gather_object(mine, tables, group=groups.data, group_dst=0)
        if tables is None:
            return None
        return pa.concat_tables(tables).sort_by([("group_id", "ascending"), ("sample_index", "ascending")])


def rollout_rows(
    recipe: TrainRecipe,
    processor: ChatProcessor,
    rollouts: Sequence[Rollout],
    rewards: Rewards,
    advantages: Tensor,
    minibatches: Sequence[Minibatch],
) -> list[dict[str, Any]]:
    """Return what is recorded of each rollout of this rank before the updates, column -> value.

    Args:
        recipe: the run's recipe.
        processor: decodes prompts.
        rollouts: N rollouts, whole groups of them.
        rewards: their rewards.
        advantages: float64 ``[N]``.
        minibatches: says which update each belongs to.
    """
    updates = {index: number for number, each in enumerate(minibatches) for index in each.rollouts.tolist()}
    named = {task: _parts_of(recipe, task) for task in recipe.env.tasks}
    totals, values = rewards.total.tolist(), {name: part.tolist() for name, part in rewards.parts.items()}
    prompts: dict[int, dict[str, Any]] = {}  # by group
    rows: list[dict[str, Any]] = []
    for index, (rollout, advantage) in enumerate(zip(rollouts, advantages.tolist(), strict=True)):
        prompt = rollout.prompt
        if rollout.group_id not in prompts:
            prompts[rollout.group_id] = _prompt_columns(prompt, processor)
        response = read(rollout, recipe.env, recipe.data.response_format)
        failed = isinstance(response, FailedReward)
        has_reward = index not in rewards.failures
        parts = [name for name in values if has_reward and name in named[prompt.task]]
        rows.append(
            {
                **prompts[rollout.group_id],
                "update": updates[index],
                "group_id": rollout.group_id,
                "sample_index": rollout.sample_index,
                "response_text": storable(rollout.text),
                "answer": None if failed or response.answer is None else storable(response.answer),
                "well_formed": not failed and response.is_well_formed,
                "response_ids": rollout.response_ids.numpy(),
                "behaviour_logprobs": rollout.logprobs.numpy(),
                "kept_ids": None if rollout.kept_ids is None else rollout.kept_ids.tolist(),
                "reward": totals[index] if has_reward else None,
                **{REWARD_PREFIX + name: values[name][index] for name in parts},
                "advantage": advantage,
                "truncated": rollout.truncated,
                "masked": _masked(recipe, rollout, has_reward=has_reward),
            }
        )
    return rows


def _parts_of(recipe: TrainRecipe, task: str) -> set[str]:
    """Names of the parts that a task's reward has."""
    added = {OVERLONG, "reference_kl_sum"}
    return {*recipe.env.reward_weights, *recipe.env.tasks[task].reward_weights, *added}


def _prompt_columns(prompt: Prompt, processor: ChatProcessor) -> dict[str, Any]:
    sample = prompt.sample
    return {
        "task": sample.task,
        "prompt_key": storable(sample.key),
        "prompt_text": storable(processor.prompt_text(prompt.inputs)),
        "question": storable(sample.question),
        "reference": storable(sample.answer),
        "answer_format": sample.answer_format,
        "images": [storable(f"{sample.key}#{number}") for number in range(len(sample.images))],
        "image_widths": [width for width, _ in sample.resized_sizes],
        "image_heights": [height for _, height in sample.resized_sizes],
    }


def _masked(recipe: TrainRecipe, rollout: Rollout, *, has_reward: bool, out_of_ratio: bool = False) -> str | None:
    """Why a rollout is left out of the loss; the first reason of several."""
    if not has_reward:
        return NO_REWARD
    if recipe.grpo.overlong == "mask" and rollout.truncated:
        return OVERLONG
    return RATIO if out_of_ratio else None


def _known_after(recipe: TrainRecipe, rollouts: Sequence[Rollout], minibatches: Sequence[Minibatch]) -> pa.Table:
    """The columns that the updates make known, with group and sample, in the order of this rank's rollouts."""
    old, entropies, weights = (_by_rollout(minibatches, name) for name in ("old", "entropies", "weights"))
    return pa.table({})  # replaced below
