# SPDX-License-Identifier: Apache-2.0
"""The base of all recipe sections: strict, frozen models without a single default."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field
from pydantic_core import PydanticCustomError

# Text that is not empty.
Text = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """A section of a recipe: one mapping of the YAML file.

    Unknown keys are forbidden and values are not coerced: ``"3"`` is not 3, ``true`` is not 1; an int may stand for a
    float. No field has a default: the exemplar recipe is the only place that holds one.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


def conflict(message: str, *keys: str) -> PydanticCustomError:
    """Return an error that concerns several keys at once.

    Args:
        message: what is wrong, and with which values.
        keys: the dotted keys that conflict, relative to the section that raises the error.
    """
    return PydanticCustomError("conflict", "{message}", {"message": message, "keys": list(keys)})


def ascending(section: Section, names: Sequence[str]) -> None:
    """Require that the named fields do not decrease, in that order."""
    values = [getattr(section, name) for name in names]
    if values != sorted(values):
        shown = " <= ".join(f"{name} ({value})" for name, value in zip(names, values, strict=True))
        raise conflict(f"must hold: {shown}", *names)
