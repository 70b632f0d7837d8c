# SPDX-License-Identifier: Apache-2.0
"""Tables of what ``run`` measured, from its file of results alone: ``python -m benchmarks.step.report``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.step.sizes import (
    BY_ANSWER,
    BY_PROMPT,
    BY_SAMPLES,
    FLOOR,
    LARGE,
    OURS,
    OURS_UNSHARED,
    SIDES,
    SMALL,
    TRL,
    TRL_FORMS,
    TRL_MICRO,
    Size,
)

PHASES = ("process", "generation", "old log-probabilities", "update")
NAMES = {
    OURS: "ours, prompt shared",
    OURS_UNSHARED: "ours, not shared",
    TRL: "TRL, one micro-batch",
    TRL_MICRO: "TRL, a micro-batch a prompt",
    FLOOR: "plain torch, prompt shared",
}
GIB = 2**30


def read(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file of results; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Measured:
    """The counted steps of one number of threads."""

    def __init__(self, records: Iterable[dict[str, Any]], threads: int) -> None:
        self._records = [record for record in records if record["threads"] == threads]

    def steps(self, size: Size, side: str) -> list[dict[str, Any]]:
        """Return the counted steps of a side."""
        return [
            record
            for record in self._records
            if record["size"] == size.name and record["side"] == side and not record["warm_up"]
        ]

    def seconds(self, size: Size, side: str) -> float | None:
        """Return the median step of a side, in the processor's seconds; None where there is none."""
        steps = self.steps(size, side)
        return median(step["cpu"] for step in steps) if steps else None


def write(directory: Path) -> None:
    """Write ``report.md`` beside the results."""
    records = read(directory / "results.jsonl")
    parts = ["# Whole step, CPU seconds", ""]
    for threads in sorted({record["threads"] for record in records}):
        measured = Measured(records, threads)
        parts += [f"## {threads} thread{'s' if threads > 1 else ''}", ""]
        for size in (SMALL, LARGE):
            parts += _steps_table(measured, size)
        for title, sizes, name in (
            ("answers a prompt, n", BY_SAMPLES, lambda size: size.samples),
            ("prompt length, tokens", BY_PROMPT, lambda size: size.prompt_tokens),
            ("answer length, tokens", BY_ANSWER, lambda size: size.answer_tokens),
        ):
            parts += _growth_table(measured, title, [(str(name(size)), size) for size in sizes])
        loads = [record["load"] for record in measured._records]
        if loads:
            parts += [f"Load of the machine while it was measured: {min(loads):.1f} to {max(loads):.1f}.", ""]
    (directory / "report.md").write_text("\n".join(parts))


def _steps_table(measured: Measured, size: Size) -> list[str]:
    sides = [side for side in SIDES if measured.steps(size, side)]
    if not sides:
        return []
    references = {form: seconds for form in TRL_FORMS if (seconds := measured.seconds(size, form)) is not None}
    rows = []
    for side in sides:
        steps, seconds = measured.steps(size, side), measured.seconds(size, side)
        assert seconds is not None
        phases = [median(step["phases"].get(phase, 0.0) for step in steps) for phase in PHASES]
        rest = median(step["cpu"] - sum(step["phases"].get(phase, 0.0) for phase in PHASES) for step in steps)
        lowest, highest = min(step["cpu"] for step in steps), max(step["cpu"] for step in steps)
        rows.append(
            [
                NAMES[side],
                f"**{seconds:.3f}**",
                f"{lowest:.3f}-{highest:.3f} ({len(steps)})",
                *(f"{value:.3f}" for value in (*phases, rest)),
                f"{max(step['peak_bytes'] for step in steps) / GIB:.2f}",
                *(f"{references[form] / seconds:.2f}x" for form in references),
            ]
        )
    ratios = [f"{NAMES[form]} / side" for form in references]
    head = ["side", "step", "range (steps)", *PHASES, "rest", "peak, GiB", *ratios]
    title = (
        f"### ({size.name}) {size.prompts} prompts of {size.prompt_tokens:,} tokens ({size.image_tokens:,} of them "
        f"image), {size.samples} answers of {size.answer_tokens}"
    )
    return [title, "", *_table(head, rows), ""]


def _growth_table(measured: Measured, title: str, sizes: Sequence[tuple[str, Size]]) -> list[str]:
    rows = []
    for name, size in sizes:
        seconds = [measured.seconds(size, side) for side in (OURS, OURS_UNSHARED, TRL)]
        if any(value is not None for value in seconds):
            rows.append([name, *("-" if value is None else f"{value:.3f}" for value in seconds)])
    if not rows:
        return []
    size = sizes[0][1]
    fixed = f"{size.prompts} prompt{'s' if size.prompts > 1 else ''} a step; the rest as at (i)"
    return [
        f"### By {title}",
        "",
        fixed + ".",
        "",
        *_table([title, NAMES[OURS], NAMES[OURS_UNSHARED], NAMES[TRL]], rows),
        "",
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


def main() -> None:
    """Write the report anew."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, default=Path("runs/bench-step"))
    write(parser.parse_args().directory)


if __name__ == "__main__":
    main()
