# SPDX-License-Identifier: Apache-2.0
"""``checkpointing``, ``logger`` and ``cluster``: what is written, where, and by how many processes."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator

from megatron_g2rpo.recipe.base import Section, Text


def seconds_of(time: str) -> int:
    """Return the seconds of a time ``DD:HH:MM:SS`` (days, hours, minutes, seconds).

    Raises:
        ValueError: it is not written so.
    """
    parts = time.split(":")
    if len(parts) != 4 or not all(part.isdecimal() and part.isascii() for part in parts):
        raise ValueError(f'{time!r} is no time "DD:HH:MM:SS": days, hours, minutes, seconds, in quotes')
    days, hours, minutes, seconds = map(int, parts)
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _is_time(time: str) -> str:
    if seconds_of(time) == 0:
        raise ValueError("a run that must save at once cannot begin; null: no limit")
    return time


class Checkpointing(Section):
    """``checkpointing``: which checkpoints are saved, and where."""

    enabled: bool
    """Whether to save checkpoints, from which the run can resume."""
    checkpoint_dir: Text
    """Folder of the checkpoints."""
    save_period: PositiveInt
    """Number of steps between checkpoints; the last step is always saved."""
    keep_top_k: PositiveInt | None
    """Number of checkpoints to keep, the best by ``metric_name``, and the newest beside them; null: all."""
    metric_name: Text | None
    """Metric of the validation that says which are best; null: the newest are."""
    higher_is_better: bool
    """Whether the best checkpoint is that with the largest metric, or with the smallest."""
    async_save: bool
    """Whether a checkpoint is written while the run goes on."""
    checkpoint_must_save_by: Annotated[str, AfterValidator(_is_time)] | None
    """Time from the start of the process by which the run has saved a checkpoint and stops, to be started again."""
    export_hf: bool
    """Whether to write the final policy as a Hugging Face directory, ``<logger.log_dir>/hf``."""

    @field_validator("metric_name")
    @classmethod
    def _of_the_validation(cls, name: str | None) -> str | None:
        """Take NeMo-RL's ``val:mean_reward`` for ``val/mean_reward``."""
        if name is None:
            return None
        return f"val/{name.removeprefix('val:')}" if name.startswith("val:") else name


class Wandb(Section):
    """``logger.wandb``: which run of Weights & Biases this is; ``WANDB_MODE`` and ``WANDB_API_KEY`` are its own."""

    project: Text
    """Its project."""
    name: Text | None
    """What the run is called there; null: after the run directory."""
    entity: Text | None
    """User or team of the project; null: the user's default."""


class Trackio(Section):
    """``logger.trackio``: which run of trackio this is; ``TRACKIO_DIR`` and ``TRACKIO_SPACE_ID`` are its own."""

    project: Text
    """Its project."""
    name: Text | None
    """What the name of the run begins with, which ends with the run's id; null: after the run directory."""


class Profile(Section):
    """``logger.profile``: traces of a few steps, and what the memory held when it was short."""

    enabled: bool
    """Whether to profile; nothing is recorded otherwise."""
    steps: Annotated[tuple[PositiveInt, ...], Field(strict=False, min_length=1)]
    """Steps of which a trace is written, ``<log_dir>/profile/step_N-rank_R.json.gz``, one file each."""
    ranks: Annotated[tuple[NonNegativeInt, ...], Field(strict=False, min_length=1)]
    """Ranks that write them."""
    with_stack: bool
    """Whether traces name the Python line of each operation; it makes them several times as large, and slow."""
    memory_history: NonNegativeInt
    """Allocations of a GPU that are remembered, for the snapshot that a lack of memory leaves in
    ``<log_dir>/profile/out_of_memory-rank_R.pickle``; 0: none."""


class Logger(Section):
    """``logger``: the run directory, and what is logged."""

    log_dir: Text
    """The run directory, which holds metrics.jsonl, recipe.yaml, tensorboard/, checkpoints/ and hf/."""
    tensorboard_enabled: bool
    """Whether to write TensorBoard events as well."""
    report_enabled: bool
    """Whether to write the page of ``report``, ``<log_dir>/report/report.html``: at each validation, and at the end."""
    wandb_enabled: bool
    """Whether to log to Weights & Biases as well, from a process of its own."""
    wandb: Wandb
    """Which run of Weights & Biases this is."""
    trackio_enabled: bool
    """Whether to log to trackio as well, from a process of its own."""
    trackio: Trackio
    """Which run of trackio this is."""
    profile: Profile
    """Traces of a few steps."""
    num_val_samples_to_print: NonNegativeInt
    """Number of responses that are printed at each validation."""


class Rollouts(Section):
    """``logger.rollouts``: what a run keeps of its rollouts, see ``records``."""

    enabled: bool
    """Whether ``train`` records the rollouts of its steps, in ``<logger.log_dir>/rollouts``."""
    period: PositiveInt
    """Number of steps between two that are kept."""
    budget_mb: PositiveFloat
    """Megabytes that the records of the run take together; where they would take more, whole groups are left out."""


class TrainLogger(Logger):
    """``logger`` of ``train``, which samples."""

    rollouts: Rollouts
    """What the run keeps of its rollouts."""


class Cluster(Section):
    """``cluster``: how many processes run, and on what hardware."""

    num_nodes: PositiveInt
    """Number of machines."""
    gpus_per_node: PositiveInt
    """Number of processes per machine: one per GPU; on CPUs any number."""
    device: Literal["auto", "cpu", "gpu"]
    """Hardware to run on; auto: GPUs where there are any."""
    watchdog_s: Annotated[float, Field(gt=0.0, lt=1800.0)] | None
    """Seconds without any progress after which the stacks of all ranks are written and the job is ended; before the
    first step at least 600. Less than the collectives' 30 minutes, whose error names a rank that waits; null: never."""
