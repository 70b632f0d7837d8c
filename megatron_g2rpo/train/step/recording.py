# SPDX-License-Identifier: Apache-2.0
"""The rollouts of a step as rows of a record (``records``), gathered from the data-parallel ranks to one that writes.

``begin`` comes as soon as a step is sampled and scored, ``finish`` after its updates: what fails in between has left a
record that can be replayed, however the process ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch.distributed as dist
from torch import Tensor

from megatron_g2rpo import recipe as recipes
from megatron_g2rpo.collectives import from_first
from megatron_g2rpo.data.packing import response_values
from megatron_g2rpo.data.processing import ChatProcessor
from megatron_g2rpo.policy.process_groups import ParallelGroups
from megatron_g2rpo.recipe import TrainRecipe
from megatron_g2rpo.records.schema import REWARD_PREFIX, UNFINISHED, Header, storable
from megatron_g2rpo.records.writing import RolloutWriter, drop_after, table_of
from megatron_g2rpo.tasks.scoring import OVERLONG, read
from megatron_g2rpo.train.assembly import Components
from megatron_g2rpo.train.run.owners import run_id
from megatron_g2rpo.train.step.minibatches import Minibatch
from megatron_g2rpo.types import FailedReward, Prompt, Rewards, Rollout

# Why a rollout is left out of the loss; under `grpo.overlong: mask` also OVERLONG.
NO_REWARD, RATIO = "no reward", "ratio"
PLACE = ("group_id", "sample_index")
REFERENCE_KL = "reference_kl_sum"  # the part that the trainer adds, see `g2rpo_step`


class Recording:
    """Records the rollouts of a run's steps. Made by every rank; a collective, as are ``begin`` and ``finish``.

    Args:
        recipe: the run's recipe.
        groups: this rank's place in the layout.
        processor: decodes prompts.
        note: shows the user a line.
    """

    def __init__(
        self, recipe: TrainRecipe, groups: ParallelGroups, processor: ChatProcessor, note: Callable[[str], None]
    ) -> None:
        self._recipe, self._groups, self._processor = recipe, groups, processor
        run, options = Path(recipe.logger.log_dir), recipe.logger.rollouts
        self._run_id, self._digest = from_first(lambda: run_id(run)), recipes.fingerprint(recipe)
        self._rollouts: Sequence[Rollout] = ()
        self._writer = RolloutWriter(
            run, period=options.period, budget_mb=options.budget_mb, last_step=recipe.grpo.max_num_steps, note=note
        )

    def begin(self, step: int, rollouts: Sequence[Rollout], rewards: Rewards, seconds: float) -> None:
        """Record a step that was sampled and scored. A collective of all ranks.

        Args:
            step: number of the step, from 1.
            rollouts: this data-parallel rank's rollouts.
            rewards: their rewards.
            seconds: time that it took to generate them.
        """
        self._rollouts = rollouts
        parts = tuple(rewards.parts)
        shared = {
            "step": step,
            "weights_version": step - 1,
            "data_rank": self._groups.data_rank,
            "engine": self._recipe.policy.generation.backend,
            "seconds": seconds,
        }

        def make() -> pa.Table:
            rows = zip(
                rollout_columns(self._recipe, self._processor, rollouts),
                reward_columns(self._recipe, rollouts, rewards),
                strict=True,
            )
            return table_of([{**shared, **sampled, **rewarded} for sampled, rewarded in rows], parts)

        table = self._gathered(make)
        if table is None:
            return
        header = Header(
            run_id=self._run_id,
            release=version("megatron-g2rpo"),
            recipe=self._digest,
            step=step,
            rollouts=table.num_rows,
            data_ranks=self._groups.data_size,
            parts=parts,
        )
        self._writer.begin(table, header)

    def finish(self, rewards: Rewards, advantages: Tensor, minibatches: Sequence[Minibatch]) -> None:
        """Complete the step's record after its updates. A collective of all ranks.

        Args:
            rewards: the rewards of this rank's rollouts, with the part that the trainer adds, if it does.
            advantages: float64 ``[N]``, their advantages.
            minibatches: the rollouts, packed, with old log-probabilities and entropies.
        """
        rollouts, self._rollouts = self._rollouts, ()
        parts = tuple(rewards.parts)
        names = {*PLACE, "reward", *(REWARD_PREFIX + part for part in parts), *UNFINISHED, "masked"}

        def make() -> pa.Table:
            rows = zip(
                rollouts,
                reward_columns(self._recipe, rollouts, rewards),
                advantages.tolist(),
                update_columns(minibatches),
                strict=True,
            )
            complete = [
                {
                    **dict(zip(PLACE, (rollout.group_id, rollout.sample_index), strict=True)),
                    **rewarded,
                    "advantage": advantage,
                    **updated,
                    "masked": rewarded["masked"] or updated["masked"],
                }
                for rollout, rewarded, advantage, updated in rows
            ]
            return table_of(complete, parts, names)

        table = self._gathered(make)
        if table is not None:
            self._writer.finish(table, parts)

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
        return pa.concat_tables(tables).sort_by([(name, "ascending") for name in PLACE])


def recording_of(
    recipe: TrainRecipe, components: Components, first_step: int, note: Callable[[str], None]
) -> Recording | None:
    """Return what records a run's rollouts, or None where the recipe records none. A collective of all ranks.

    Records of steps that the run takes again are removed either way: they are of rollouts that no longer count.

    Args:
        recipe: the run's recipe.
        components: what the loop works with.
        first_step: the step that the run goes on from.
        note: shows the user a line.

    Raises:
        OSError: a record of a step that is taken again cannot be removed.
    """
    from_first(lambda: drop_after(Path(recipe.logger.log_dir), first_step))
    if not recipe.logger.rollouts.enabled:
        return None
    return Recording(recipe, components.policy.groups, components.processor, note)


def rollout_columns(
    recipe: TrainRecipe, processor: ChatProcessor, rollouts: Sequence[Rollout]
) -> Iterator[dict[str, Any]]:
    """Iterate over what is recorded of each rollout as it was sampled, column -> value.

    Args:
        recipe: the run's recipe.
        processor: decodes prompts.
        rollouts: N rollouts, whole groups of them.
    """
    samples, size = recipe.grpo.num_generations_per_prompt, recipe.policy.train_global_batch_size
    prompts: dict[int, dict[str, Any]] = {}  # by group
    for rollout in rollouts:
        if rollout.group_id not in prompts:
            prompts[rollout.group_id] = _prompt_columns(rollout.prompt, processor)
        response = read(rollout, recipe.env, recipe.data.response_format)
        is_read = not isinstance(response, FailedReward)
        yield {
            **prompts[rollout.group_id],
            "update": (rollout.group_id * samples + rollout.sample_index) // size,  # as `pack_minibatches` has it
            "group_id": rollout.group_id,
            "sample_index": rollout.sample_index,
            "response_text": storable(rollout.text),
            "answer": storable(response.answer) if is_read and response.answer is not None else None,
            "well_formed": is_read and response.is_well_formed,
            "response_ids": rollout.response_ids.numpy(),
            "behaviour_logprobs": rollout.logprobs.numpy(),
            "kept_ids": None if rollout.kept_ids is None else rollout.kept_ids.numpy(),
            "truncated": rollout.truncated,
        }


def reward_columns(recipe: TrainRecipe, rollouts: Sequence[Rollout], rewards: Rewards) -> Iterator[dict[str, Any]]:
    """Iterate over the reward of each rollout, its parts, and why it is left out of the loss before its update.

    Args:
        recipe: the run's recipe.
        rollouts: N rollouts.
        rewards: their rewards; of a rollout without one, all is null.
    """
    env = recipe.env
    of_every_task = {OVERLONG, REFERENCE_KL, *env.reward_weights}
    named = {task: {*of_every_task, *settings.reward_weights} for task, settings in env.tasks.items()}
    totals, values = rewards.total.tolist(), {name: part.tolist() for name, part in rewards.parts.items()}
    for index, rollout in enumerate(rollouts):
        if index in rewards.failures:
            yield {"masked": NO_REWARD}
            continue
        parts = [name for name in values if name in named[rollout.prompt.task]]
        is_masked = recipe.grpo.overlong == "mask" and rollout.truncated
        yield {
            "reward": totals[index],
            **{REWARD_PREFIX + name: values[name][index] for name in parts},
            "masked": OVERLONG if is_masked else None,
        }


def update_columns(minibatches: Sequence[Minibatch]) -> list[dict[str, Any]]:
    """Return what the updates made known of each of this rank's rollouts, in their order.

    Args:
        minibatches: the step's, with old log-probabilities and entropies.
    """
    rows: dict[int, dict[str, Any]] = {}
    for minibatch in minibatches:
        for batch, entropies in zip(minibatch.micro_batches, minibatch.entropies, strict=True):
            assert batch.old_logprobs is not None
            old, of_entropy = response_values(batch, batch.old_logprobs), response_values(batch, entropies)
            weights = {} if batch.importance_weights is None else response_values(batch, batch.importance_weights)
            for index, logprobs in old.items():
                rows[int(minibatch.rollouts[index])] = {
                    "old_logprobs": logprobs.numpy(),
                    "entropies": of_entropy[index].numpy(),
                    # A truncated weight is above 0: none of a sequence is where its ratio was out of bounds.
                    "masked": RATIO if index in weights and not weights[index].any() else None,
                }
    return [rows[index] for index in sorted(rows)]


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
