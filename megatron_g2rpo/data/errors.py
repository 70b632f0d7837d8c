# SPDX-License-Identifier: Apache-2.0
"""Errors of a dataset as a whole, and of one sample."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

UNREADABLE = "unreadable"


class DataError(ValueError):
    """A dataset cannot be used, because of a shard, the index, a task or a setting; the message says what to do."""


class SampleError(DataError):
    """One sample cannot be used, such as one with a broken image or json; the message names shard and sample.

    It is the only data error that ``data.on_bad_sample: skip`` counts instead of raising.

    Args:
        message: what is wrong, and what to do.
        reason: kind of the fault in one word, under which skipped samples are counted: ``image`` (undecodable, or of a
            shape that cannot be encoded), ``field`` (json or type), ``contents`` (not what was indexed), ``text``,
            ``too_long``, ``reference``, ``response``.

    Attributes:
        reason: see the argument.
    """

    def __init__(self, message: str, reason: str = UNREADABLE) -> None:
        super().__init__(message)
        self.reason = reason


@contextmanager
def because(reason: str) -> Iterator[None]:
    """Context manager, or decorator, that gives the sample errors inside of it a reason where they have none.

    Args:
        reason: kind of the fault in one word, see ``SampleError``.
    """
    try:
        yield
    except SampleError as error:
        if error.reason == UNREADABLE:
            error.reason = reason
        raise
