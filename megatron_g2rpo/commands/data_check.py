# SPDX-License-Identifier: Apache-2.0
"""``megatron-g2rpo data check``: everything that is wrong with a dataset, before any GPU is asked for."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.progress import track
from rich.table import Table
from rich.text import Text

from megatron_g2rpo.commands.model_dir import with_local_model
from megatron_g2rpo.data import checks
from megatron_g2rpo.data.dataset import open_dataset
from megatron_g2rpo.data.errors import DataError
from megatron_g2rpo.data.inspection import Inspected, Inspector
from megatron_g2rpo.data.processing import ChatProcessor
from megatron_g2rpo.data.shard_index import Entry, ShardIndex
from megatron_g2rpo.plan.planner import load_recipe
from megatron_g2rpo.processes import forkserver
from megatron_g2rpo.recipe import Recipe, TrainRecipe
from megatron_g2rpo.tasks import response_formats

SHOWN = 5  # faults of a kind that are printed; the file has all
_BARS, _WIDTH = 12, 40


@dataclass
class Report:
    """What a check found.

    Attributes:
        samples: what was seen of each sample.
        faults: reason -> messages. They make the exit status 1.
        warnings: lines about what a run would not refuse, but its results may suffer from.
        room: largest number of tokens of a prompt under the recipe; None without one.
    """

    samples: list[Inspected]
    faults: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    warnings: list[str] = field(default_factory=list)
    room: int | None = None


def run(
    data: Path,
    recipe: Path | None,
    overrides: Sequence[str],
    *,
    validation: Path | None,
    workers: int,
    out: Path | None,
) -> bool:
    """Check a dataset, print what was found, and return whether a run could use all of it.

    Args:
        data: the dataset.
        recipe: the recipe whose limits, tasks and model it is checked against; None checks the dataset alone.
        overrides: ``key=value`` each.
        validation: the held-out dataset, of which images must not occur in ``data``; None for the recipe's.
        workers: number of processes.
        out: JSON-lines file for all faults; None for none.

    Raises:
        DataError: the dataset, or its index, cannot be read at all.
        RecipeError: the recipe is wrong.
    """
    index = open_dataset(str(data), None)
    loaded = None if recipe is None else with_local_model(load_recipe(recipe, overrides))
    held_out = _held_out(loaded, validation)
    if validation is not None:
        open_dataset(str(validation), None)  # what was asked for by name must be there
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
    report = Report(samples=_inspected(data, recipe, overrides, workers))
    try:
        index.verify()
    except DataError as error:
        report.faults["checksum"].append(str(error))
    for sample in report.samples:
        for reason, message in sample.faults:
            report.faults[reason].append(message)
    if loaded is not None:
        _against(report, index, loaded)
    _repeated(report)
    for path in held_out:
        _leaked(report, index, path, workers)
    if out is not None:
        lines = [{"reason": reason, "message": text} for reason, texts in report.faults.items() for text in texts]
        out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    Console(highlight=False, soft_wrap=True).print(shown(report, data))
    return not any(report.faults.values())


def inspector_of(index: ShardIndex, recipe: Recipe | None) -> Inspector:
    """Return what looks at the samples of a dataset as a run of the recipe would."""
    if recipe is None:
        return Inspector(read=index.read)
    data, policy = recipe.data, recipe.policy
    instructed = response_formats.by_task(recipe.env, data.response_format) if data.format_instruction else None
    processor = ChatProcessor(policy.model_name, data.min_pixels, data.max_pixels, data.system_prompt, instructed)
    if isinstance(recipe, TrainRecipe):
        fits = [checks.prompt_fits(policy)]
    else:
        fits = [checks.response_fits(processor, policy.max_total_sequence_length)]
    formats = {name: task.answer_format for name, task in recipe.env.tasks.items()}
    return Inspector(read=index.read, answer_formats=formats, processor=processor, checks=fits)


def _inspected(data: Path, recipe: Path | None, overrides: Sequence[str], workers: int) -> list[Inspected]:
    index = open_dataset(str(data), None)
    entries = [entry for task in index.tasks for entry in index.entries(task)]
    arguments = (str(data), recipe, tuple(overrides))
    if workers <= 1:
        _prepare(*arguments)
        return list(_progress(map(_inspect, entries), len(entries)))
    with ProcessPoolExecutor(
        workers, mp_context=forkserver([__name__]), initializer=_prepare, initargs=arguments
    ) as pool:
        return list(_progress(pool.map(_inspect, entries, chunksize=32), len(entries)))


_inspectors: list[Inspector] = []  # of this worker process


def _prepare(data: str, recipe: Path | None, overrides: Sequence[str]) -> None:
    loaded = None if recipe is None else with_local_model(load_recipe(recipe, overrides))
    _inspectors[:] = [inspector_of(open_dataset(data, None), loaded)]


def _inspect(entry: Entry) -> Inspected:
    return _inspectors[0](entry)


def _progress(found: Iterable[Inspected], total: int) -> Iterator[Inspected]:
    console = Console(stderr=True)
    yield from track(found, "samples", total=total, console=console, disable=not console.is_terminal, transient=True)


def _against(report: Report, index: ShardIndex, recipe: Recipe) -> None:
    """Compare the dataset with what the recipe says of tasks and lengths."""
    tasks, policy = recipe.env.tasks, recipe.policy
    for task in index.tasks:
        if task not in tasks:
            report.faults["task"].append(f"task {task!r} is not listed under env.tasks; add it there")
    report.warnings += [f"task {task!r} of the recipe has no sample" for task in tasks if task not in index.tasks]
    report.room = policy.max_total_sequence_length
    if isinstance(recipe, TrainRecipe):
        report.room -= policy.generation.max_new_tokens


def _repeated(report: Report) -> None:
    """Warn of samples that ask the same, and of those among them whose references differ."""
    asked: defaultdict[str, list[Inspected]] = defaultdict(list)
    for sample in report.samples:
        if sample.question_digest:
            asked[sample.question_digest].append(sample)
    several = [samples for samples in asked.values() if len(samples) > 1]
    differing = [samples for samples in several if len({sample.answer for sample in samples}) > 1]
    for samples, what in (
        (several, "ask the same as another one"),
        (differing, "ask the same and have different references"),
    ):
        if samples:
            count, first = sum(map(len, samples)), samples[0]
            report.warnings.append(f"{count} samples {what}, such as {first[0].key} and {first[1].key}")


def _held_out(recipe: Recipe | None, validation: Path | None) -> list[Path]:
    if validation is not None:
        return [validation]
    if recipe is None or recipe.data.validation is None:
        return []
    return [Path(part.path) for part in recipe.data.validation.parts]


def _leaked(report: Report, index: ShardIndex, validation: Path, workers: int) -> None:
    """Warn of images that occur in the held-out dataset, too, pixel by pixel; or that they could not be compared."""
    try:
        shards = {shard.resolve() for shard in open_dataset(str(validation), None).shards}
    except DataError as error:
        report.warnings.append(f"whether images are in the held-out data, too, was not looked at: {error}")
        return
    if not shards.isdisjoint(shard.resolve() for shard in index.shards):
        return  # the held-out data is what is checked
    here = {digest: sample.key for sample in report.samples for digest in sample.image_digests}
    held_out = _inspected(validation, None, (), workers)
    leaked = [(here[digest], sample.key) for sample in held_out for digest in sample.image_digests if digest in here]
    if leaked:
        report.warnings.append(
            f"{len(leaked)} images of {validation} occur here, too, such as that of {leaked[0][0]}, there "
            f"{leaked[0][1]}: a validation on them measures memory"
        )


def shown(report: Report, data: Path) -> Group:
    """Return what is printed: a table by task, a histogram of prompt lengths, the faults and the warnings."""
    parts: list[Any] = [_table(report, data)]
    lengths = [sample.prompt_tokens for sample in report.samples if sample.prompt_tokens is not None]
    if lengths:
        parts += [Text("\nPrompt tokens"), *map(Text, histogram(lengths, report.room))]
    for reason, messages in sorted(report.faults.items()):
        parts.append(Text(f"\n{reason}: {len(messages)}", style="bold red"))
        parts += [Text(f"  {message}") for message in messages[:SHOWN]]
        if len(messages) > SHOWN:
            parts.append(Text(f"  ... and {len(messages) - SHOWN} more; --out FILE lists all"))
    parts += [Text(f"\nwarning: {line}", style="yellow") for line in report.warnings]
    count = sum(map(len, report.faults.values()))
    faults = "1 fault" if count == 1 else f"{count} faults"
    parts.append(Text(f"\n{faults}; a run stops there, or leaves the samples out under data.on_bad_sample=skip"
                      if count else "\nno faults"))  # fmt: skip
    return Group(*parts)


def _table(report: Report, data: Path) -> Table:
    table = Table(title=str(data), title_justify="left")
    for name in ("task", "answer formats", "samples", "images", "pixels, median", "prompt tokens", "faults"):
        table.add_column(name, justify="left" if name in ("task", "answer formats") else "right")
    by_task: defaultdict[str, list[Inspected]] = defaultdict(list)
    for sample in report.samples:
        by_task[sample.task].append(sample)
    for task, samples in sorted(by_task.items()):
        formats = Counter(sample.answer_format for sample in samples if sample.answer_format)
        areas = sorted(width * height for sample in samples for width, height in sample.image_sizes)
        tokens = [sample.prompt_tokens for sample in samples if sample.prompt_tokens is not None]
        table.add_row(
            task,
            ", ".join(f"{name} {count}" for name, count in formats.most_common()),
            str(len(samples)),
            str(len(areas)),
            f"{areas[len(areas) // 2]:,}" if areas else "-",
            f"{min(tokens)} - {max(tokens)}" if tokens else "-",
            str(sum(bool(sample.faults) for sample in samples)),
        )
    return table


def histogram(lengths: Sequence[int], room: int | None) -> list[str]:
    """Return a histogram of lengths as lines of text; the interval in which the room ends is marked."""
    low, high = min(lengths), max(lengths)
    width = max(-(-(high - low + 1) // _BARS), 1)
    counts = Counter((length - low) // width for length in lengths)
    lines = []
    for bar in range((high - low) // width + 1):
        first, last = low + bar * width, low + (bar + 1) * width - 1
        size = -(-_WIDTH * counts[bar] // max(counts.values()))
        over = f"  beyond the {room} that the recipe leaves" if room is not None and last > room and counts[bar] else ""
        lines.append(f"{first:>8} - {last:<8}{'#' * size:<{_WIDTH}} {counts[bar]}{over}")
    return lines
