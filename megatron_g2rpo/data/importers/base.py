# SPDX-License-Identifier: Apache-2.0
"""What an importer yields: samples, and rows that are no samples with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from megatron_g2rpo import registry
from megatron_g2rpo.data.errors import SampleError


@dataclass(frozen=True, kw_only=True)
class ImportedSample:
    """One sample of a dataset of another format, with the fields that a shard holds.

    Attributes:
        name: name of the sample in error messages, such as a file and a row.
        fields: ``task``, ``question``, ``answer`` and ``answer_format``; all other fields are kept, too.
        images: in the order in which they are shown, encoded image files, or paths of such files, which are relative to
            the source's directory (``--image-dir`` names another).
        record: the row as it was read, where ``--task-field`` and ``--answer-format-field`` look; None where it is
            ``fields``.
    """

    name: str
    fields: Mapping[str, Any]
    images: Sequence[bytes | Path] = ()
    record: Mapping[str, Any] | None = field(default=None, repr=False)


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """A row that is not imported.

    Attributes:
        name: name of the row.
        reason: why, in words that rows of the same fault share: rejections are counted by it.
        message: why, in full.
    """

    name: str
    reason: str
    message: str

    @classmethod
    def by(cls, error: SampleError, name: str, reason: str = "cannot be read") -> Self:
        """Return the rejection that an error means; one that has a reason of its own (``Refusal``) keeps it."""
        return cls(name=name, reason=error.reason if isinstance(error, Refusal) else reason, message=str(error))


class Refusal(SampleError):
    """A row cannot be imported, for a reason that other rows may share.

    Args:
        name: name of the row.
        reason: why, in words that hold for every row of the same fault; it says what to do where something can be done.
        detail: what this row has, such as a value.
    """

    def __init__(self, name: str, reason: str, detail: object = "") -> None:
        super().__init__(f"{name}: {reason}{f': {detail}' if str(detail) else ''}")
        self.name, self.reason = name, reason


# Takes the source, and its options as keyword-only parameters. A sample that it raises SampleError for ends the import;
# one that it yields as Rejected is counted.
Importer = Callable[..., Iterator[ImportedSample | Rejected]]

register = registry.importers.register
"""Register an importer. Its fact ``matches``, a function of one record (a mapping), tells whether a dataset that
begins with this record looks like one of its own; ``--importer auto`` asks it."""
