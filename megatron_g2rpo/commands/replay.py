# SPDX-License-Identifier: Apache-2.0
"""``train --replay``: what a recorded step would do under a recipe, beside what it did."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from megatron_g2rpo import recipe as recipes
from megatron_g2rpo.recipe import TrainRecipe
from megatron_g2rpo.records.reading import file_of, files_in, ranges, read_header, read_step
from megatron_g2rpo.records.schema import Header, RecordError
from megatron_g2rpo.train.run.directory import RECIPE_FILE
from megatron_g2rpo.train.run.metrics_file import METRICS_FILE
from megatron_g2rpo.train.run.owners import CHECKPOINT_DIR, LOG_DIR, steps_in
from megatron_g2rpo.weights.manifest import read_manifest

# In the run directory: what a replay writes, should it have to.
WRITTEN = "replays"
# What a replay does not do; these come after the user's overrides.
_NOT_DONE = (
    "data.validation=null",
    "grpo.val_period=0",
    "grpo.val_at_start=false",
    "grpo.val_at_end=false",
    "checkpointing.metric_name=null",
    "env.reward_workers=0",
    "logger.rollouts.enabled=false",
    *(f"logger.{name}_enabled=false" for name in ("tensorboard", "report", "wandb", "trackio")),
    "logger.profile.enabled=false",
)
# What is not computed again: a change of these would change nothing, and look as if it had no effect.
_RECORDED = (
    "data.task_weights",
    "data.system_prompt",
    "data.response_format",
    "data.format_instruction",
    "data.min_pixels",
    "data.max_pixels",
    "env.reward_options",
    "grpo.dynamic_sampling",
    "grpo.num_prompts_per_step",
    "grpo.num_generations_per_prompt",
    "grpo.overlong_penalty.buffer",
    "grpo.seed",
    *(f"policy.generation.{name}" for name in ("max_new_tokens", "min_p", "stop_strings", "temperature")),
    *(f"policy.generation.{name}" for name in ("top_k", "top_p")),
)
_RECORDED_OF_TASKS = ("answer_format", "response_format", "length")
# Metrics of what a replay does not do, and of how long it takes.
_NOT_MEASURED = (
    *("time/", "val/", "speed/", "memory/", "work/", "train/sampling/"),
    *("train/skipped_samples", "train/skipped/", "train/failed_rewards"),
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """What a step is replayed from.

    Attributes:
        record: all rollouts of the step, in the order of group and sample.
        header: what their file says of itself.
        checkpoint: directory of the checkpoint of the step before; None: the step is the run's first.
        settings: dotted key -> value of the run's recipe.
        metrics: the step's line of ``metrics.jsonl``; None: it has none, since the step failed or is under way.
    """

    record: pa.Table
    header: Header
    checkpoint: Path | None
    settings: Mapping[str, Any]
    metrics: Mapping[str, float] | None


def overrides_for(run: Path) -> list[str]:
    """Return overrides that leave of a run what its replay does, and keep what that writes apart."""
    return [*_NOT_DONE, f"{LOG_DIR}={run / WRITTEN}"]


def find(run: Path, step: int) -> Source:
    """Find what a step of a run is replayed from.

    Args:
        run: the run directory.
        step: number of the step, from 1.

    Raises:
        RecordError: the step was not recorded, its record is damaged or the budget cut it, or the run lacks the
            checkpoint before it; says which steps can be replayed.
    """
    settings = _settings(run)
    checkpoints = _checkpoints(run, settings)
    record, header = read_step(run, step)
    if not header.is_whole:
        raise RecordError(
            f"{file_of(run, step)} holds {record.num_rows} of the step's {header.rollouts} rollouts, which is what "
            f"logger.rollouts.budget_mb left of them: only whole steps can be replayed; {_possible(run, checkpoints)}"
        )
    checkpoint = checkpoints.get(step - 1)
    if step > 1:
        if checkpoint is None:
            have = f"the run has those of {ranges(sorted(checkpoints))}" if checkpoints else "the run has none"
            raise RecordError(
                f"step {step} starts from the checkpoint of step {step - 1}, and {have} (checkpointing.save_period, "
                f"keep_top_k); {_possible(run, checkpoints)}"
            )
        manifest = read_manifest(checkpoint)
        if manifest is not None and manifest.run_id != header.run_id:
            raise RecordError(
                f"{checkpoint} belongs to run {manifest.run_id or 'none'}, the record of step {step} to "
                f"{header.run_id or 'none'}"
            )
    return Source(
        record=record,
        header=header,
        checkpoint=checkpoint if step > 1 else None,
        settings=settings,
        metrics=_metrics(run / METRICS_FILE, step),
    )


def changed(recipe: TrainRecipe, settings: Mapping[str, Any]) -> list[str]:
    """Return a line for each key of a recipe that differs from the run's, of those that a replay reads.

    Raises:
        RecordError: a key differs that says what was sampled, or how a part of a reward is computed.
    """
    mine = recipes.settings(recipe)
    ours = {override.partition("=")[0] for override in _NOT_DONE}
    # An engine's directory for weights lies in the run directory by default.
    skipped = (*ours, "logger", "checkpointing", "cluster", "imports", "policy.generation.vllm_server_cfg")
    keys = [
        key
        for key in sorted(mine.keys() | settings.keys())
        if mine.get(key) != settings.get(key) and not _is_below(key, skipped)
    ]
    if refused := [key for key in keys if _is_recorded(key)]:
        shown = "; ".join(f"{key}: {settings.get(key)} in the run, {mine.get(key)} here" for key in refused)
        raise RecordError(
            f"a replay samples and scores nothing, and these keys would have no effect: {shown}. Leave them as the run "
            f"has them ({RECIPE_FILE} in its directory is its recipe)"
        )
    return [f"{key}: {settings.get(key)} in the run, {mine.get(key)} here" for key in keys]


def run(recipe: TrainRecipe, source: Source, note: Callable[[str], None]) -> None:
    """Replay a step, and say which metrics change. A collective of all ranks.

    Args:
        recipe: the recipe, with ``overrides_for``, whose model is a local directory.
        source: what is replayed.
        note: shows the user a line; does nothing on ranks but the first.

    Raises:
        Exception: see ``train.replay.replay``.
    """
    from megatron_g2rpo.train.replay import replay  # after the environment of the policy was set

    header = source.header
    start = "the initial policy" if source.checkpoint is None else str(source.checkpoint)
    note(f"replaying step {header.step}: {header.rollouts} recorded rollouts, from {start}")
    metrics = replay(recipe, source.record, header, source.checkpoint, note)
    for line in report(source.metrics, metrics, header.step):
        note(line)


def report(recorded: Mapping[str, float] | None, replayed: Mapping[str, float], step: int) -> Iterator[str]:
    """Iterate over lines that set a replay beside the record: what differs, or that nothing does.

    Args:
        recorded: the step's metrics in the run; None where it has none.
        replayed: those of the replay.
        step: number of the step.
    """
    mine = {name: value for name, value in replayed.items() if not name.startswith(_NOT_MEASURED)}
    if recorded is None:
        yield f"the run has no metrics of step {step}, which did not end there; here it gives:"
        width = max(map(len, mine))
        yield from (f"  {name:<{width}}  {value:.8g}" for name, value in mine.items())
        return
    theirs = {name: value for name, value in recorded.items() if name != "step" and not name.startswith(_NOT_MEASURED)}
    names = list(dict.fromkeys([*theirs, *mine]))
    different = [name for name in names if not _are_equal(theirs.get(name), mine.get(name))]
    if not different:
        yield f"step {step}: all {len(names)} metrics are equal to the record's"
        return
    yield f"step {step}: {len(different)} of {len(names)} metrics change"
    width = max(map(len, different))
    yield f"  {'':<{width}}  {'record':>14}  {'replay':>14}  {'difference':>14}"
    for name in different:
        before, now = theirs.get(name), mine.get(name)
        difference = "" if before is None or now is None else f"{now - before:+.4g}"
        yield f"  {name:<{width}}  {_number(before):>14}  {_number(now):>14}  {difference:>14}"


def _settings(run: Path) -> dict[str, Any]:
    path = run / RECIPE_FILE
    try:
        return recipes.flatten(dict(yaml.safe_load(path.read_text())))
    except FileNotFoundError as error:
        raise RecordError(f"{run} is no run directory: it holds no {RECIPE_FILE}") from error
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise RecordError(f"{path} is damaged ({str(error).splitlines()[0]})") from error


def _checkpoints(run: Path, settings: Mapping[str, Any]) -> dict[int, Path]:
    """The run's checkpoints by step; where they lay in the run directory, they still do, though it has moved."""
    place, before = Path(str(settings[CHECKPOINT_DIR])), Path(str(settings[LOG_DIR]))
    if place.is_relative_to(before):
        place = run / place.relative_to(before)
    return {step: path for step, path in steps_in(place).items() if path.name == f"step_{step}"}


def _possible(run: Path, checkpoints: Mapping[int, Path]) -> str:
    """Say which steps can be replayed, the end of a sentence."""
    starts = {1, *(step + 1 for step in checkpoints)}
    steps = [step for step, path in files_in(run).items() if step in starts and read_header(path).is_whole]
    return f"step {ranges(steps)} can be" if steps else "none of this run can be"


def _metrics(path: Path, step: int) -> dict[str, float] | None:
    lines = path.read_text().splitlines() if path.exists() else []
    return next((found for line in lines if (found := json.loads(line))["step"] == step), None)


def _is_recorded(key: str) -> bool:
    of_task = key.startswith("env.tasks.") and any(f".{name}" in key for name in _RECORDED_OF_TASKS)
    return of_task or _is_below(key, _RECORDED)


def _is_below(key: str, sections: Sequence[str]) -> bool:
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def _are_equal(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return one == other or (math.isnan(one) and math.isnan(other))


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.8g}"
