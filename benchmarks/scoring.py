# SPDX-License-Identifier: Apache-2.0
"""How long the answers of a step take to score: 4,096 responses of mixed formats, 8 a prompt.

Every group has a reference of its own and eight answers to it, as models write them: right, wrong, wrapped, unreadable.
Processor's time of one process, after a first round over other answers that imports the libraries.

    python benchmarks/scoring.py
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from megatron_g2rpo import registry
from megatron_g2rpo.types import Sample

RESPONSES, GROUP = 4096, 8
WORDS = "the a red blue dog cat sign street says open closed left right above car of with and two people".split()  # noqa: SIM905
Case = tuple[str, list[str]]


def _number(rng: random.Random) -> Case:
    value = rng.randint(1, 10**6) / 100
    near = value * 1.07
    answers = [f"{value}", f"${value}$", f"\\boxed{{{value}}}", f"**{value:,}** cm", f"{near:.2f}", f"x = {value}"]
    return f"{value}", [*answers, "I can't tell", f"{value} or {near}"]


def _choice(rng: random.Random) -> Case:
    right, wrong = rng.sample("ABCD", 2)
    return right, [
        right,
        f"({right})",
        f"{right}. cat",
        f"**{right}**",
        wrong,
        f"Option {wrong}",
        "cat",
        f"{right} or {wrong}",
    ]


def _text(rng: random.Random) -> Case:
    said = [rng.choice(WORDS) for _ in range(60)]
    broken = [rng.choice(WORDS) if rng.random() < 0.2 else word for word in said]
    reference = " ".join(said)
    return reference, [
        reference,
        reference.upper(),
        " ".join(broken),
        " ".join(said[:30]),
        "no text",
        "",
        reference * 2,
        " ".join(said[::-1]),
    ]


def _direction(rng: random.Random) -> Case:
    return "left above", ["left above", "above left", "left", "right", "right below", "", "left right", "The left."]


def _expression(rng: random.Random) -> Case:
    a, b, c = rng.sample(range(2, 500), 3)
    reference = rf"$$\frac{{{a}\sqrt{{{b}}}}}{{{c}}}$$"
    answers = [
        rf"\frac{{{a}\sqrt{{{b}}}}}{{{c}}}",
        f"{a}sqrt({b})/{c}",
        rf"\frac{{{a + 1}\sqrt{{{b}}}}}{{{c}}}",
        f"{a / c:.3f}",
    ]
    return reference, [*answers, rf"\boxed{{{a}\sqrt{{{b}}}}}", f"x = {b}", rf"{a}\pi", "no"]


def _box(rng: random.Random) -> list[int]:
    x, y, width, height = (rng.randint(1, 400) for _ in range(4))
    return [x, y, x + width, y + height]


def _boxes(rng: random.Random) -> Case:
    x1, y1, x2, y2 = right = _box(rng)
    answers = [f"{right}", f"({x1},{y1}),({x2},{y2})", json.dumps({"boxes": _box(rng)}), "nowhere", "[1, 2, 3"]
    fenced = f"```json\n{json.dumps([{'bbox_2d': right, 'label': 'dog'}])}\n```"
    return json.dumps({"boxes": right}), [*answers, fenced, f"{[right, _box(rng)]}", f"It is at {right}."]


def _several_points(rng: random.Random) -> Case:
    points = [_box(rng)[:2] for _ in range(3)]
    return json.dumps(points), [json.dumps(points[::-1]), json.dumps(points[:2]), "nowhere", f"{points[0]}"] * 2


def _interval(rng: random.Random) -> Case:
    start = rng.randint(0, 100)
    times = [json.dumps({"time": [start, start + rng.randint(1, 20)]}) for _ in range(6)]
    return times[0], [*times, f"{start} - {start + 9}", "later"]


def _track(rng: random.Random) -> Case:
    tracks = [json.dumps({"boxes": {str(frame): _box(rng) for frame in range(32)}}) for _ in range(GROUP)]
    return tracks[0], tracks


def _moving(rng: random.Random) -> Case:
    tracks = [json.dumps({"time": [1, 9 + i], "boxes": {str(s): _box(rng) for s in range(1, 9)}}) for i in range(GROUP)]
    return tracks[0], tracks


def _prompt(rng: random.Random) -> Case:
    def one() -> str:
        points = [[_box(rng)[:2] for _ in range(3)] for _ in range(2)]
        return json.dumps({"boxes": _box(rng), "positive_points": points[0], "negative_points": points[1]})

    prompts = [one() for _ in range(GROUP)]
    return prompts[0], prompts


CASES: dict[str, Callable[[random.Random], Case]] = {
    **dict.fromkeys(["numeric", "numerical", "regression", "relative"], _number),
    **dict.fromkeys(["multiple choice", "multiple_choice"], _choice),
    **dict.fromkeys(["exact", "edit_distance", "OCR", "open-ended"], _text),
    **dict.fromkeys(["box_iou", "spatial grounding", "point_in_box"], _boxes),
    "axes": _direction,
    "math": _expression,
    "points": _several_points,
    "temporal grounding": _interval,
    "tracking": _track,
    "spatial-temporal grounding": _moving,
    "segmentation": _prompt,
}


def _round_of(seed: int) -> dict[str, tuple[int, float]]:
    """Return format -> responses and seconds of processor's time."""
    rng = random.Random(seed)
    spent: dict[str, tuple[int, float]] = dict.fromkeys(CASES, (0, 0.0))
    for group in range(RESPONSES // GROUP):
        name = list(CASES)[group % len(CASES)]
        reference, answers = CASES[name](rng)
        sample = Sample(key=f"{group}", task="", question="", answer=reference, answer_format=name)
        function = registry.answer_formats.get(name)
        start = time.process_time()
        for answer in answers:
            function(answer, sample)
        count, seconds = spent[name]
        spent[name] = count + len(answers), seconds + time.process_time() - start
    return spent


def main() -> None:
    """Print time by format, and in all."""
    assert CASES.keys() == set(registry.answer_formats.names())
    start = time.process_time()
    _round_of(seed=1)
    first = time.process_time() - start
    spent = _round_of(seed=2)
    table = Table("format", "responses", "ms", "us each", title="scoring")
    for name, (count, seconds) in sorted(spent.items(), key=lambda item: -item[1][1]):
        table.add_row(name, f"{count:,}", f"{seconds * 1e3:.1f}", f"{seconds / count * 1e6:.0f}")
    total = sum(seconds for _, seconds in spent.values())
    mathematics = spent["math"][1]
    table.add_row("all", f"{sum(count for count, _ in spent.values()):,}", f"{total * 1e3:.1f}", "")
    table.add_row("all but math", "", f"{(total - mathematics) * 1e3:.1f}", "")
    Console().print(table)
    print(f"the first round, which imports the libraries: {first:.1f} s")


if __name__ == "__main__":
    main()
