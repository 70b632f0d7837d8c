# SPDX-License-Identifier: Apache-2.0
"""Which importer a source is for, told from its first row."""

from __future__ import annotations

from pathlib import Path

from megatron_g2rpo import registry
from megatron_g2rpo.data.errors import DataError
from megatron_g2rpo.data.importers.records import Record, read_records


def detect(source: Path, subset: str | None = None) -> str:
    """Return the name of the one importer whose format the first readable row of a source looks like.

    Raises:
        DataError: the source cannot be read or has no row, or no importer or several take it; the message lists the
            row's fields, or the candidates.
    """
    rejected, first = None, None
    for row in read_records(source, subset):
        if isinstance(row, Record):
            first = row
            break
        rejected = rejected or row
    if first is None:
        why = "no row" if rejected is None else f"no row that can be read; the first: {rejected.message}"
        raise DataError(f"{source} holds {why}")
    entries = (registry.importers.entry(name) for name in registry.importers.names())
    fitting = [entry.name for entry in entries if "matches" in entry.facts and entry.facts["matches"](first.fields)]
    if len(fitting) == 1:
        return fitting[0]
    has = f"{first.name} has the fields {', '.join(map(repr, first.fields))}"
    if fitting:
        raise DataError(f"{has}, which {' and '.join(fitting)} read: choose with --importer {fitting[0]}")
    raise DataError(
        f"{has}, which no importer knows ({', '.join(registry.importers.names())}): say where question and answer are "
        "with --map question=FIELD --map answer=FIELD, and with --map images=FIELD where the images are"
    )
