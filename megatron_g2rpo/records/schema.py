# SPDX-License-Identifier: Apache-2.0
"""What is recorded of a rollout: the columns of ``RUN/rollouts/step_NNNNNN.parquet``, and what a file says of itself.

``docs/records.md`` has the same table for readers; a test holds the two together.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import pyarrow as pa

VERSION = 1
DIRECTORY = "rollouts"  # in the run directory
REWARD_PREFIX = "reward_"  # of the columns of parts, ``reward_accuracy``
_KEY = b"megatron_g2rpo"

_INTS, _FLOATS = pa.list_(pa.int32()), pa.list_(pa.float32())

_BEFORE_PARTS = (
    ("step", pa.int32()),
    ("update", pa.int32()),
    ("weights_version", pa.int32()),
    ("data_rank", pa.int32()),
    ("task", pa.string()),
    ("prompt_key", pa.string()),
    ("group_id", pa.int32()),
    ("sample_index", pa.int32()),
    ("prompt_text", pa.string()),
    ("question", pa.string()),
    ("reference", pa.string()),
    ("answer_format", pa.string()),
    ("images", pa.list_(pa.string())),
    ("image_widths", _INTS),
    ("image_heights", _INTS),
    ("response_text", pa.string()),
    ("answer", pa.string()),
    ("well_formed", pa.bool_()),
    ("response_ids", _INTS),
    ("behaviour_logprobs", _FLOATS),
    ("old_logprobs", _FLOATS),
    ("entropies", _FLOATS),
    ("kept_ids", pa.list_(_INTS)),
    ("reward", pa.float64()),
)
_AFTER_PARTS = (
    ("advantage", pa.float64()),
    ("truncated", pa.bool_()),
    ("masked", pa.string()),
    ("engine", pa.string()),
    ("seconds", pa.float32()),
)


# Null in a step whose updates were not taken.
UNFINISHED = ("advantage", "old_logprobs", "entropies")


class RecordError(ValueError):
    """A record that is not there, cannot be read, or cannot be replayed; the message says why, and what to do."""


def columns(parts: Sequence[str] = ()) -> dict[str, pa.DataType]:
    """Return name -> type of every column, in their order.

    Args:
        parts: names of the reward's parts, in the order in which they are added up.
    """
    return dict([*_BEFORE_PARTS, *((REWARD_PREFIX + part, pa.float64()) for part in parts), *_AFTER_PARTS])


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a file says of itself, JSON under ``megatron_g2rpo`` in the metadata of its schema.

    Attributes:
        schema_version: version of the columns, ``VERSION``.
        run_id: the run that wrote it, see ``identity.yaml``; empty where no run has claimed the directory.
        release: version of the package that wrote it.
        recipe: digest of the recipe, ``recipe.fingerprint``.
        step: number of the step, from 1.
        rollouts: number of rollouts that the step had, over all ranks.
        data_ranks: number of data-parallel ranks that shared them.
        parts: names of the reward's parts, in the order in which they are added up.
        is_whole: whether all of them are in the file; else the budget cut it.
        is_finished: whether the step's updates were taken; else the step failed, or goes on right now, and the columns
            ``UNFINISHED`` are null.
    """

    schema_version: int = VERSION
    run_id: str
    release: str
    recipe: str
    step: int
    rollouts: int
    data_ranks: int
    parts: tuple[str, ...]
    is_whole: bool = True
    is_finished: bool = False

    def metadata(self) -> dict[bytes, bytes]:
        """Return it as the metadata of a schema."""
        return {_KEY: json.dumps(asdict(self)).encode()}

    @classmethod
    def of(cls, schema: pa.Schema, where: str) -> Header:
        """Read it from the metadata of a schema.

        Args:
            schema: the schema of a file.
            where: name of the file, for the message.

        Raises:
            RecordError: there is none, or it is that of a later release.
        """
        text = (schema.metadata or {}).get(_KEY)
        if text is None:
            raise RecordError(f"{where} is no record of a run: its metadata lacks {_KEY.decode()!r}")
        try:
            values = json.loads(text)
            if values["schema_version"] != VERSION:
                raise RecordError(
                    f"{where} has version {values['schema_version']} of the columns, and this release reads {VERSION}: "
                    f"read it with release {values.get('release')}"
                )
            return cls(**{**values, "parts": tuple(values["parts"])})
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise RecordError(f"{where}: its metadata {_KEY.decode()!r} is damaged ({error})") from error


def storable(text: str) -> str:
    """Return a text as Parquet can hold it, which knows valid Unicode alone.

    Two surrogates that belong together become their character; one that stands alone becomes U+FFFD.
    """
    if text.isascii():
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
