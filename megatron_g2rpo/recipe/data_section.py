# SPDX-License-Identifier: Apache-2.0
"""``data``: the prompts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import NonNegativeFloat, PositiveInt, model_validator

from megatron_g2rpo.recipe.base import Section, Text, ascending


class DataSource(Section):
    """``data.train`` and ``data.validation``."""

    path: Text
    """Folder or glob of webdataset ``.tar`` shards."""


class Data(Section):
    """``data``: the prompts."""

    train: DataSource
    """Shards to train on."""
    validation: DataSource
    """Held-out shards."""
    on_bad_sample: Literal["error", "skip"]
    """A sample that cannot be decoded: stop and name it, or count it and go on."""
    min_pixels: PositiveInt | None
    """Smaller images are scaled up to this area, pixels; null: the image processor's own."""
    max_pixels: PositiveInt | None
    """Larger images are scaled down to this area, pixels; null: the image processor's own."""
    system_prompt: str | None
    """System message before every question; null: none."""
    response_format: Text
    """How responses are laid out: what prompts ask for, and where thinking and answer are found."""
    format_instruction: bool
    """Whether prompts say how responses are laid out; false: for a policy that has learnt it."""
    task_weights: Mapping[str, NonNegativeFloat]
    """Task -> relative share of the prompts; a task that is not listed has 1; {}: all equal."""

    @model_validator(mode="after")
    def _pixels(self) -> Data:
        if self.min_pixels is not None and self.max_pixels is not None:
            ascending(self, ["min_pixels", "max_pixels"])
        return self
