# SPDX-License-Identifier: Apache-2.0
"""``data``: the datasets, and how prompts are made of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import (
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from megatron_g2rpo.recipe.base import Section, Text, ascending, conflict


class WeightedPath(Section):
    """An entry of ``data.train.path``, where it is a list: one of several datasets."""

    path: Text
    """Folder or glob of webdataset ``.tar`` shards."""
    weight: PositiveFloat
    """How often a sample of this dataset is drawn, relative to one of the same task in a dataset of weight 1."""


class DataSource(Section):
    """``data.train`` and ``data.validation``: one dataset, or several that are used as one."""

    path: Text | tuple[Text | WeightedPath, ...]
    """Folder or glob of webdataset ``.tar`` shards; or a list of them, each a path or ``{path: ..., weight: ...}``."""

    @field_validator("path", mode="plain")
    @classmethod
    def _path(cls, value: Any) -> str | tuple[str | WeightedPath, ...]:
        # By hand: the errors of a union would name its branches, which are no keys of a recipe.
        if isinstance(value, str) and value:
            return value
        if not isinstance(value, list | tuple) or not value:
            raise PydanticCustomError(
                "path", "Input should be a path, or a list of paths or of {path: ..., weight: ...}"
            )
        return tuple(_entry(number, each) for number, each in enumerate(value, start=1))

    @field_serializer("path")
    def _written(self, path: str | tuple[str | WeightedPath, ...]) -> str | list[Any]:
        if isinstance(path, str):
            return path
        return [each if isinstance(each, str) else each.model_dump() for each in path]

    @property
    def parts(self) -> tuple[WeightedPath, ...]:
        """The datasets, each with its weight, which is 1 where none is given."""
        listed = (self.path,) if isinstance(self.path, str) else self.path
        return tuple(WeightedPath(path=each, weight=1.0) if isinstance(each, str) else each for each in listed)


def _entry(number: int, value: Any) -> str | WeightedPath:
    if isinstance(value, str) and value:
        return value
    try:
        return WeightedPath.model_validate(value)
    except ValidationError as error:
        faults = [
            "".join(f"{part}: " for part in fault["loc"]) + fault["msg"] for fault in error.errors(include_url=False)
        ]
        raise PydanticCustomError(
            "path", "entry {number}: {faults}", {"number": number, "faults": "; ".join(faults)}
        ) from error


class Data(Section):
    """``data``: the datasets, and how prompts are made of them."""

    train: DataSource
    """Shards to train on."""
    validation: DataSource | None
    """Held-out shards; null where nothing validates."""
    on_bad_sample: Literal["error", "skip"]
    """What to do with a sample that cannot be used (undecodable, too long, an unreadable reference or field): ``error``
    stops and names it, ``skip`` counts it and takes another of its task."""
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
    def _weights(self) -> Data:
        if self.validation is not None and any(part.weight != 1.0 for part in self.validation.parts):
            raise conflict("a weight says how often training draws; validation answers every sample once", "validation")
        return self

    @model_validator(mode="after")
    def _pixels(self) -> Data:
        if self.min_pixels is not None and self.max_pixels is not None:
            ascending(self, ["min_pixels", "max_pixels"])
        return self
