# SPDX-License-Identifier: Apache-2.0
"""How the recipes of two runs differ."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from megatron_g2rpo.recipe import flatten


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return the dotted keys whose values differ, each with both values as text, ``-`` where a recipe lacks it."""
    mine, theirs = flatten(dict(first)), flatten(dict(second))
    keys = [*mine, *(key for key in theirs if key not in mine)]
    return [
        (key, _text(mine, key), _text(theirs, key))
        for key in keys
        if mine.get(key, _ABSENT) != theirs.get(key, _ABSENT)
    ]


_ABSENT = object()


def _text(flat: Mapping[str, Any], key: str) -> str:
    if key not in flat:
        return "-"
    value = flat[key]
    return value if isinstance(value, str) else json.dumps(value, default=str)
