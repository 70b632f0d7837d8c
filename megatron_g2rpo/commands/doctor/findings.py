# SPDX-License-Identifier: Apache-2.0
"""The report of ``doctor``: findings, as tables for people and as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Literal

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

# error: something that is needed is missing, or something that is there is broken; the exit status says so.
Status = Literal["ok", "absent", "warning", "error"]
_STYLES: dict[Status, str] = {"ok": "green", "absent": "dim", "warning": "yellow", "error": "bold red"}


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        group: what it belongs to: hardware, packages, lock, Transformer Engine or recipe.
        what: the thing.
        value: what was found, a version or a choice.
        status: ``ok``; ``absent``, and not needed; ``warning``, usable with less; or ``error``.
        why: the reason, or what to do; may be empty.
    """

    group: str
    what: str
    value: str
    status: Status = "ok"
    why: str = ""


def usable(found: Sequence[Finding]) -> bool:
    """Return whether nothing is an error."""
    return all(each.status != "error" for each in found)


def as_json(found: Sequence[Finding], recipe: Path | None) -> str:
    """Return the report as one JSON object: ``usable``, ``virtual``, ``recipe``, and all ``findings``."""
    report = {
        "usable": usable(found),
        "virtual": any(each.what == "device" and "(virtual)" in each.value for each in found),
        "recipe": None if recipe is None else str(recipe),
        "findings": [asdict(each) for each in found],
    }
    return json.dumps(report, indent=2, ensure_ascii=False)


def tables(found: Sequence[Finding]) -> RenderableType:
    """Return the report as a table for each group and a verdict."""
    parts: list[RenderableType] = []
    for group, members in groupby(found, key=lambda each: each.group):
        table = Table(title=group, title_justify="left", title_style="bold", box=None, padding=(0, 2, 0, 0))
        for header in ("", "", "", ""):
            table.add_column(header, overflow="fold")
        table.show_header = False
        for each in members:
            # Of what is absent the value says so.
            status = Text("" if each.status in ("ok", "absent") else each.status, _STYLES[each.status])
            table.add_row(Text(each.what), Text(each.value, _STYLES[each.status]), status, Text(each.why))
        parts += [table, Text()]
    errors = sum(each.status == "error" for each in found)
    verdict = "Usable." if not errors else f"Not usable: {errors} error(s), see above."
    return Group(*parts, Text(verdict, "green" if not errors else "bold red"))
