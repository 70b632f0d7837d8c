# SPDX-License-Identifier: Apache-2.0
"""The types of a sample's fields: what may be coerced is, and the rest is refused by field and sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_g2rpo.data.errors import SampleError


def checked_fields(fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the fields of a sample with their types checked; numbers as question or answer become text.

    Raises:
        SampleError: a field is missing or of a type that cannot be coerced; the message names sample and field.
    """
    checked = dict(fields)
    for field in ("task", "question", "answer", "answer_format"):
        value = checked.get(field)
        if isinstance(value, int | float) and not isinstance(value, bool) and value == value:
            checked[field] = value = str(value)
        if not isinstance(value, str) or not value:
            got = f"got {value!r}" if field in checked else "and is missing"
            raise SampleError(f"{name}: the field {field!r} must be text that is not empty, {got}")
    return checked
