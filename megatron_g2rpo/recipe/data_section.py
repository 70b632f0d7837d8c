# SPDX-License-Identifier: Apache-2.0
"""``data``: the datasets, and how prompts are made of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from pydantic import NonNegativeFloat, PositiveInt, model_validator

from megatron_g2rpo.recipe.base import Section, Text, ascending


class DataSource(Section):
    """``data.train`` and ``data.validation``: one dataset."""

    path: Text
    """Folder or glob of webdataset ``.tar`` shards."""


class Data(Section):
    """``data``: the datasets, and how prompts are made of them."""

    train: DataSource
    """Shards to train on."""
    validation: DataSource
    """Held-out shards."""
    on_bad_sample: Literal["error", "skip"]
    """What to do with a sample that cannot be decoded: ``error`` stops and names it, ``skip`` counts and skips it."""
    min_pixels: PositiveInt | None
    """Smallest area of an image, pixels; smaller ones are scaled up. null: the image processor's own bound."""
    max_pixels: PositiveInt | None
    """Largest area of an image, pixels; larger ones are scaled down. null: the image processor's own bound."""
    system_prompt: str | None
    """System message before every question; null: no system message."""
    response_format: Text
    """Name of the response format: what prompts ask responses to look like, and where thinking and answer are found."""
    format_instruction: bool
    """Whether prompts contain the instruction of the response format; false is for a policy that has learnt it."""
    task_weights: Mapping[str, NonNegativeFloat]
    """Task -> relative share of the prompts; a task that is not listed has 1. {}: all tasks have equal shares."""

    @model_validator(mode="after")
    def _pixels(self) -> Data:
        if self.min_pixels is not None and self.max_pixels is not None:
            ascending(self, ["min_pixels", "max_pixels"])
        return self
