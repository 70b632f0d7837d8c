# SPDX-License-Identifier: Apache-2.0
"""``megatron-g2rpo data import``: a dataset of another format, written as shards with an index."""

from __future__ import annotations

import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from megatron_g2rpo import registry
from megatron_g2rpo.data.importers.detect import detect
from megatron_g2rpo.data.importers.write import ImportResult, ImportSettings, import_dataset
from megatron_g2rpo.recipe.errors import RecipeError
from megatron_g2rpo.recipe.imports import as_written, import_all
from megatron_g2rpo.recipe.layers import parse_override
from megatron_g2rpo.recipe.named import checked_options

AUTO = "auto"
SOME_REJECTED = 3  # exit status


def run(
    source: Path,
    target: Path,
    importer: str,
    options: Sequence[str],
    imports: Sequence[str],
    settings: ImportSettings,
    *,
    map_fields: Sequence[str] = (),
    subset: str | None = None,
) -> ImportResult:
    """Import a dataset, with a progress bar on a terminal.

    Args:
        source: what the importer reads.
        target: directory for the shards.
        importer: name of the importer; ``auto`` tells it from the first row.
        options: ``key=value`` each, values typed as in a recipe: the importer's keyword-only parameters.
        imports: modules or ``.py`` files with importers and answer formats of the user's own.
        settings: what does not depend on the importer.
        map_fields: ``FIELD=PATH`` each, for the importer ``fields``, which ``auto`` then means.
        subset: name of a Hugging Face dataset's configuration.

    Raises:
        RecipeError: an unknown name or option, or an import that fails.
        DataError, SampleError: see ``import_dataset``.
    """
    import_all(as_written(list(imports), Path.cwd(), "--imports"), "--imports")
    settings.check()
    if importer == AUTO:
        importer = "fields" if map_fields else detect(source, subset)
        Console(stderr=True).print(f"importer: {importer}", highlight=False)
    if importer not in registry.importers:
        raise RecipeError(f"--importer: {registry.importers.unknown(importer)}")
    given = {key: value for option in options for key, value in parse_override(option).tree.items()}
    if map_fields:
        given["map"] = list(map_fields)
    if subset is not None:
        given["subset"] = subset
    checked, faults = checked_options(registry.importers, importer, given, "importer")
    if faults:
        raise RecipeError("\n".join(fault.message for fault in faults))
    with _ends_on_sigterm(), _progress() as on_row:
        return import_dataset(registry.importers.bind(importer, **checked), source, target, settings, on_row)


def summary(result: ImportResult, target: Path) -> Iterator[str | Table]:
    """Yield what to print of an import: one line, a table by task and answer format, and one of what was rejected."""
    samples = sum(result.samples.values())
    yield f"wrote {samples} samples with {result.images} images to {target}"
    has_parts = any(part for part, _, _ in result.samples)
    table = Table("task", "answer format")
    for part in ("train", "val") if has_parts else ("samples",):
        table.add_column(part, justify="right")
    counts: dict[tuple[str, str], Counter[str]] = {}
    for (part, task, form), count in result.samples.items():
        counts.setdefault((task, form), Counter())[part] += count
    for (task, form), by_part in sorted(counts.items()):
        numbers = [by_part[part] for part in (("train", "val") if has_parts else ("",))]
        table.add_row(task, form, *map(str, numbers))
    yield table
    if result.rejected:
        yield f"rejected rows: {result.rejected.total()}, listed in {result.rejected_file}"
        reasons = Table("reason", "rows")
        for reason, count in result.rejected.most_common():
            reasons.add_row(reason, str(count))
        yield reasons


@contextmanager
def _progress() -> Iterator[Callable[[], None]]:
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda: None
        return
    # Without a share of the whole: most sources do not say how many rows they have.
    bar = Progress(SpinnerColumn(), TextColumn("{task.completed} rows"), TimeElapsedColumn(), console=console)
    with bar:
        task = bar.add_task("rows", total=None)
        yield lambda: bar.advance(task)


@contextmanager
def _ends_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end the import as an exception does, so that nothing half-written is left."""

    def end(*_: object) -> NoReturn:
        sys.exit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
