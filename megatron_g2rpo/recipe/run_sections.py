# SPDX-License-Identifier: Apache-2.0
"""``checkpointing``, ``logger`` and ``cluster``: what is written, where, and by how many processes."""

from __future__ import annotations

from typing import Literal

from pydantic import NonNegativeInt, PositiveInt

from megatron_g2rpo.recipe.base import Section, Text


class Checkpointing(Section):
    """``checkpointing``: what is written to disk."""

    enabled: bool
    """Save checkpoints that the run can resume from."""
    checkpoint_dir: Text
    """Folder of the checkpoints."""
    save_period: PositiveInt
    """Steps between checkpoints; the last step is always saved."""
    keep_latest_k: PositiveInt | None
    """Checkpoints kept; null: all."""
    export_hf: bool
    """Write the final policy as a Hugging Face directory, ``<logger.log_dir>/hf``."""


class Logger(Section):
    """``logger``: the run directory."""

    log_dir: Text
    """The run directory: metrics.jsonl, recipe.yaml, tensorboard/, checkpoints/, hf/."""
    tensorboard_enabled: bool
    """Write TensorBoard events as well."""
    num_val_samples_to_print: NonNegativeInt
    """Validation responses printed at each validation."""


class Cluster(Section):
    """``cluster``: the processes."""

    num_nodes: PositiveInt
    """Machines."""
    gpus_per_node: PositiveInt
    """Processes per machine: one per GPU, or on CPUs as many as wanted."""
    device: Literal["auto", "cpu", "gpu"]
    """Hardware to run on; auto: GPUs where there are any."""
