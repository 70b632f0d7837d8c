# SPDX-License-Identifier: Apache-2.0
"""Shows what sharing prompts saves, to people (a table) and to programs (a tree). GB is 10^9 bytes."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from megatron_g2rpo.plan.sharing import KEY, Sharing, Way

GB = 1e9


def table(sharing: Sharing) -> RenderableType:
    """Return both ways beside each other, for a terminal."""
    title = f"Prompts shared by the responses of a group ({KEY}: {str(sharing.on).lower()})"
    shown = Table(title=title, title_justify="left", title_style="bold")
    shown.add_column("")
    shown.add_column("shared", justify="right")
    shown.add_column("each its own", justify="right")
    cells = zip(_cells(sharing.shared), _cells(sharing.unshared), strict=True)
    for (name, shared), (_, unshared) in cells:
        shown.add_row(name, shared, unshared)
    return Group(shown, Text(sharing.sentence))


def tree(sharing: Sharing) -> dict[str, Any]:
    """Return both ways in tokens, operations, seconds and bytes, for JSON."""
    return {**asdict(sharing), "saves": sharing.saves, "sentence": sharing.sentence}


def _cells(way: Way) -> list[tuple[str, str]]:
    return [
        ("tokens of a step's rows", f"{way.tokens:,}"),
        ("micro-batches of a data rank", f"{way.micro_batches:,}"),
        ("attention of a pass, TFLOP", f"{way.attention_flops / 1e12:,.1f}"),
        ("a whole pass, TFLOP", f"{way.flops / 1e12:,.1f}"),
        ("log-probabilities before the update, s", f"{way.logprobs:,.2f}"),
        ("forward and backward passes, s", f"{way.update:,.2f}"),
        ("whole step, s", f"{way.step:,.1f}"),
        ("activations in flight, GB", f"{way.activations / GB:,.2f}"),
        ("peak, GB", f"{way.peak / GB:,.2f}"),
    ]
