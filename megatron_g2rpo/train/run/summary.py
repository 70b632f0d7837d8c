# SPDX-License-Identifier: Apache-2.0
"""What a run says of itself where it does not begin at its beginning, and at its end: before, after, time, places."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path

from megatron_g2rpo.recipe import Recipe, TrainRecipe
from megatron_g2rpo.train.run.metrics_file import METRICS_FILE
from megatron_g2rpo.train.run.trackers.feed import enabled

# What a run directory may hold, and what each is.
_PLACES = {
    METRICS_FILE: "every number of every step",
    "tensorboard": "the same for TensorBoard",
    "trackers": "what the trackers' processes say",
    "profile": "traces and memory snapshots",
    "rollouts": "what was sampled, a Parquet file a step",
    "report": "the page of the run",
    "hf": "the policy, as a Hugging Face directory",
}
# Heading -> metric of a task, of which the first and the last value are shown.
_OF_TASKS = {"sampled": "val/{}/reward", "greedy": "val/{}/greedy_reward"}
_MEANS = {"sampled": "val/mean_reward", "greedy": "val/mean_greedy_reward"}


def begins_at(recipe: Recipe, first_step: int) -> list[str]:
    """Return a line for the user if a run does not begin at its beginning.

    Args:
        recipe: the run's recipe.
        first_step: the step that it goes on after; 0: it begins.
    """
    if first_step == 0:
        return []
    key, loop = ("grpo", recipe.grpo) if isinstance(recipe, TrainRecipe) else ("sft", recipe.sft)
    where = f"{recipe.checkpointing.checkpoint_dir}/step_{first_step}"
    if first_step < loop.max_num_steps:
        return [f"the run goes on after step {first_step} of {loop.max_num_steps}, from {where}"]
    return [
        f"the run has taken its {loop.max_num_steps} steps ({where}), and no more are taken: set {key}.max_num_steps "
        "to more, or pass --fresh to begin anew"
    ]


def summary(recipe: Recipe, first_step: int, seconds: float) -> Iterator[str]:
    """Iterate over lines about a run that has ended.

    Args:
        recipe: the run's recipe.
        first_step: the step that this process went on after.
        seconds: of this process, from its start.
    """
    directory = Path(recipe.logger.log_dir)
    lines = _lines(directory / METRICS_FILE)
    last = max(lines, default=0)
    earlier = f", {first_step} of them before" if first_step else ""
    yield f"done: {last} steps{earlier}, {timedelta(seconds=round(seconds))} since the start of this process"
    yield from _before_and_after(lines, tuple(recipe.env.tasks))
    yield f"in {directory}:"
    for name, what in _PLACES.items():
        if (directory / name).exists():
            yield f"  {name}: {what}"
    if recipe.checkpointing.enabled:
        yield f"checkpoints: {recipe.checkpointing.checkpoint_dir}/step_{last}"
    for name in enabled(recipe.logger):
        yield f"{name}: project {getattr(recipe.logger, name).project}"


def _lines(path: Path) -> dict[int, Mapping[str, float]]:
    """Step -> its numbers, of the whole lines of a file of metrics."""
    if not path.exists():
        return {}
    trees = (json.loads(line) for line in path.read_text().splitlines())
    return {tree["step"]: tree for tree in trees}


def _before_and_after(lines: Mapping[int, Mapping[str, float]], tasks: tuple[str, ...]) -> Iterator[str]:
    """The first and the last validation by task; of a run that never validated, its first and last loss or reward."""
    validated = sorted(step for step, line in lines.items() if any(name.startswith("val/") for name in line))
    if len(validated) < 2:
        for name in ("train/reward", "train/loss"):
            steps = sorted(step for step, line in lines.items() if name in line)
            if len(steps) > 1:
                yield f"{name}: {lines[steps[0]][name]:.4f} (step {steps[0]}) -> {lines[steps[-1]][name]:.4f}"
        return
    first, last = lines[validated[0]], lines[validated[-1]]
    yield f"reward of the validation, step {validated[0]} -> step {validated[-1]}:"
    width = max(len(task) for task in (*tasks, "mean"))
    for task, metrics in [
        *((task, {k: v.format(task) for k, v in _OF_TASKS.items()}) for task in tasks),
        ("mean", _MEANS),
    ]:
        cells = [
            f"{heading} {first[name]:.3f} -> {last[name]:.3f}"
            for heading, name in metrics.items()
            if name in first and name in last
        ]
        if cells:
            yield f"  {task:<{width}}  {'   '.join(cells)}"
