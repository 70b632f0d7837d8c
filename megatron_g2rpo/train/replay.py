# SPDX-License-Identifier: Apache-2.0
"""A step of a run again: its updates on its recorded rollouts, from its checkpoint, by the loop's ``g2rpo_step``.

Nothing is sampled and nothing scored: rollouts, their log-probabilities and the parts of their rewards are those of the
record. The parts are weighed anew, so that the recipe may weigh them otherwise. With the recipe and the layout of the
run, the step is the same bit for bit on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import pyarrow as pa
import torch

from megatron_g2rpo.data.errors import DataError
from megatron_g2rpo.recipe import TrainRecipe
from megatron_g2rpo.records.schema import REWARD_PREFIX, Header, RecordError, storable
from megatron_g2rpo.rollout.transformers.call import Call
from megatron_g2rpo.rollout.transformers.features import in_blocks
from megatron_g2rpo.tasks.scoring import Scoring
from megatron_g2rpo.train.assembly import Components, assemble
from megatron_g2rpo.train.g2rpo import g2rpo_step
from megatron_g2rpo.train.run.checkpoints import Checkpoints
from megatron_g2rpo.train.step.prompts import shared
from megatron_g2rpo.train.step.recording import NO_REWARD
from megatron_g2rpo.train.step.rewards import FailedRewards, scoring_of
from megatron_g2rpo.train.step.sampling import Collected
from megatron_g2rpo.train.step.timers import Timers
from megatron_g2rpo.types import FailedReward, Prompt, Rewards, Rollout
from megatron_g2rpo.weights.soundness import check_whole


def replay(
    recipe: TrainRecipe, record: pa.Table, header: Header, checkpoint: Path | None, note: Callable[[str], None]
) -> dict[str, float]:
    """Take a recorded step again. A collective of all ranks.

    Args:
        recipe: the recipe, whose ``logger.log_dir`` takes what the step writes, such as a batch that is skipped.
        record: all rollouts of the step.
        header: what their file says of itself.
        checkpoint: directory of the checkpoint of the step before; None: the step is the run's first.
        note: shows the user a line.

    Returns:
        The metrics of the step.

    Raises:
        RecordError: the recipe weighs a part of the reward that was not recorded.
        DataError: a sample is no longer what it was.
        CheckpointError: the checkpoint is damaged.
        FloatingPointError: the step is one that ends a run, see ``UpdateGuard``.
    """
    _check_parts(recipe, header)
    with assemble(recipe, _NoEngine) as components:
        if checkpoint is not None:
            for line in _restore(components, checkpoint):
                note(line)
        sample = partial(recorded, record=record, header=header)
        return g2rpo_step(recipe, components, header.step, note, sample=sample)


def _restore(components: Components, checkpoint: Path) -> list[str]:
    """Bring a loop to where a checkpoint was saved; what the user must know of the data. A collective."""
    check_whole(checkpoint)
    step = int(checkpoint.name.removeprefix("step_"))
    state = Checkpoints(checkpoint.parent).load(step, components.policy)
    components.history.load_state_dict(state["history"])
    components.guard.load_state_dict(state["guard"])
    return components.stream.load_state_dict(state["stream"])


class _NoEngine:
    """What stands in the engine's place: a replay that sampled would be none."""

    def __init__(self, *_: Any) -> None: ...

    def _refuse(self, *_: Any, **__: Any) -> NoReturn:
        raise RuntimeError("a replay samples nothing")

    build = load_weights = generate = release = _refuse


@dataclass(frozen=True)
class _Rows:
    """The rows of a record that are one data-parallel rank's, in the order of groups and samples."""

    rows: Sequence[Mapping[str, Any]]

    @classmethod
    def of(cls, record: pa.Table, header: Header, rank: int, size: int) -> _Rows:
        """Return the rows of a rank: those that it had in the run, if the run had as many ranks."""
        rows = record.to_pylist()
        if size == header.data_ranks:
            return cls([row for row in rows if row["data_rank"] == rank])
        return cls([row for row in rows if row["group_id"] % size == rank])

    @property
    def prompts(self) -> dict[int, Mapping[str, Any]]:
        """Group -> its first row, in the order of groups."""
        first: dict[int, Mapping[str, Any]] = {}
        for row in self.rows:
            first.setdefault(row["group_id"], row)
        return first


def recorded(
    recipe: TrainRecipe, components: Components, step: int, timers: Timers, *, record: pa.Table, header: Header
) -> Collected:
    """Return this rank's rollouts of a recorded step and their rewards, in the place of ``sampling.collect``.

    A collective of the replica, whose ranks share the decoding of images.

    Args:
        recipe, components, step, timers: see ``sampling.collect``; nothing is drawn from the stream.
        record: all rollouts of the step.
        header: what their file says of itself.

    Raises:
        DataError: a sample is no longer what it was, or not there.
    """
    groups = components.policy.groups
    mine = _Rows.of(record, header, groups.data_rank, groups.data_size)
    with timers("data"):
        first = list(mine.prompts.values())
        prompts = shared(partial(_decoded, components, first), range(len(first)), groups)
    _encode_ahead(recipe, components, prompts)
    with timers("rewards"):
        prompt_of = dict(zip(mine.prompts, prompts, strict=True))
        rollouts = [_rollout(row, prompt_of[row["group_id"]]) for row in mine.rows]
        rewards = _rewards(recipe, mine.rows)
    return Collected(rollouts, rewards, FailedRewards(), {})


def _encode_ahead(recipe: TrainRecipe, components: Components, prompts: Sequence[Prompt]) -> None:
    """Let the policy know the features of images that generation left it, in the run: those of the embedded engine.

    To the last bit they depend on which images are encoded together.
    """
    megatron, generation = recipe.policy.megatron_cfg, recipe.policy.generation
    if generation.backend == "transformers" and megatron.model_parallel_size == 1 and not megatron.freeze_vision:
        entering = Call(prompts, 1, and_greedily=False).entering
        for block in in_blocks(image for prompt in entering for image in prompt.images):
            components.policy.model.encode_ahead(block)


def _decoded(components: Components, first: Sequence[Mapping[str, Any]], numbers: Sequence[int]) -> list[Prompt]:
    """The prompts of some groups, which must be what they were."""
    rows = [first[number] for number in numbers]
    prompts = components.stream.named([row["prompt_key"] for row in rows])
    for row, prompt in zip(rows, prompts, strict=True):
        text = storable(components.processor.prompt_text(prompt.inputs))
        widths = [width for width, _ in prompt.sample.resized_sizes]
        if (text, widths, prompt.task) != (row["prompt_text"], row["image_widths"], row["task"]):
            raise DataError(
                f"sample {prompt.key}: the prompt is no longer the one that was recorded; the data, the model's "
                "processor, or a key of the recipe that says how prompts are made has changed"
            )
    return prompts


def _rollout(row: Mapping[str, Any], prompt: Prompt) -> Rollout:
    kept = row["kept_ids"]
    return Rollout(
        prompt=prompt,
        group_id=row["group_id"],
        sample_index=row["sample_index"],
        response_ids=torch.tensor(row["response_ids"], dtype=torch.int64),
        logprobs=torch.tensor(row["behaviour_logprobs"], dtype=torch.float32),
        text=row["response_text"],
        truncated=row["truncated"],
        kept_ids=None if kept is None else torch.tensor(kept, dtype=torch.int64),
    )


def _scoring(recipe: TrainRecipe) -> Scoring:
    penalty = recipe.grpo.overlong_penalty.weight if recipe.grpo.overlong == "penalise" else None
    return scoring_of(recipe, None, overlong_weight=penalty)


def _check_parts(recipe: TrainRecipe, header: Header) -> None:
    if missing := [name for name in _scoring(recipe).names if name not in header.parts]:
        raise RecordError(
            f"the recipe weighs {', '.join(missing)}, and step {header.step} was recorded with the parts "
            f"{', '.join(header.parts)}: a replay weighs recorded parts, and computes none"
        )


def _rewards(recipe: TrainRecipe, rows: Sequence[Mapping[str, Any]]) -> Rewards:
    """The recorded parts, weighed as the recipe says."""
    failures = {
        index: FailedReward(part=NO_REWARD, message="it had no reward in the run")
        for index, row in enumerate(rows)
        if row["masked"] == NO_REWARD
    }
    return _scoring(recipe).weighed([row["task"] for row in rows], [dict(_parts(row)) for row in rows], failures)


def _parts(row: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in row.items():
        if name.startswith(REWARD_PREFIX) and value is not None:
            yield name.removeprefix(REWARD_PREFIX), value
