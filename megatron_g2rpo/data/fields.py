# SPDX-License-Identifier: Apache-2.0
"""The fields of a sample as people write them in JSON: brought to the types of ``types.Sample``, or refused by name."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from megatron_g2rpo.data.errors import SampleError

REQUIRED_FIELDS = ("task", "question", "answer", "answer_format")
# What the json is read for; everything else in it is the maker's own, and goes with the sample as ``extra``.
SAMPLE_FIELDS = (*REQUIRED_FIELDS, "images", "response")

# Characters of a question or response. Tokenising takes 260 times the memory of the text, before its length is known.
MAX_CHARACTERS = 1 << 20


def checked_fields(fields: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the fields of a sample in the types of ``types.Sample``; further fields are kept as they are.

    An answer that is a number becomes its text (``3`` is "3", ``3.0`` is "3.0"), a list or an object its JSON text,
    which answer formats read. A task that is a number becomes its text. ``images`` that are missing or null become
    an empty list, and one text a list of it. A response may be missing or null.

    Args:
        fields: the fields as JSON (or another format) has given them.
        name: name of the sample, with which error messages begin.

    Raises:
        SampleError: a field is missing, null where it must not be, of a type that cannot be meant, not finite, blank
            where it is a name, longer than ``MAX_CHARACTERS`` where it is tokenised, or no valid Unicode.
    """
    for field in REQUIRED_FIELDS:
        if field not in fields:
            raise SampleError(f"{name}: lacks the field {field!r}; a sample needs {', '.join(REQUIRED_FIELDS)}")
        if fields[field] is None:
            raise SampleError(f"{name}: field {field!r} is null; write a text, or leave the sample out")
    checked = {
        **fields,
        "task": _label(_number_as_text(fields["task"]), "task", name),
        "question": _tokenised(fields["question"], "question", name),
        "answer": _answer(fields["answer"], name),
        "answer_format": _label(fields["answer_format"], "answer_format", name),
        "images": _images(fields.get("images"), name),
    }
    if fields.get("response") is not None:
        checked["response"] = _tokenised(fields["response"], "response", name)
    return checked


def _text(value: Any, field: str, name: str) -> str:
    if not isinstance(value, str):
        raise SampleError(f"{name}: field {field!r} must be a text, not {_kind(value)}; write it as a text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise SampleError(
            f"{name}: field {field!r} is no valid Unicode: {value[error.start]!r} at character {error.start} is half "
            "of a surrogate pair; repair the text"
        ) from error
    return value


def _label(value: Any, field: str, name: str) -> str:
    text = _text(value, field, name)
    if not text.strip():
        raise SampleError(f"{name}: field {field!r} is blank; write a name")
    return text


def _tokenised(value: Any, field: str, name: str) -> str:
    text = _text(value, field, name)
    if len(text) > MAX_CHARACTERS:
        raise SampleError(
            f"{name}: field {field!r} has {len(text):,} characters, more than the {MAX_CHARACTERS:,} that are "
            "tokenised; shorten it, or leave the sample out"
        )
    return text


def _number_as_text(value: Any) -> Any:
    """Return a finite number as its text, and everything else as it is."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return str(int(value))
    if isinstance(value, float) and math.isfinite(value):
        return repr(float(value))
    return value


def _answer(value: Any, name: str) -> str:
    value = _number_as_text(value)
    if isinstance(value, bool):
        raise SampleError(f'{name}: field \'answer\' is {_kind(value)}; write the text that is meant, "yes" or "true"')
    if isinstance(value, float):
        raise SampleError(f"{name}: field 'answer' is {value}; write a finite number, or leave the sample out")
    if isinstance(value, list | tuple):
        for each in value:
            if each is None or isinstance(each, bool):
                raise SampleError(f"{name}: field 'answer' is a list with {_kind(each)} in it; write texts or numbers")
    elif not isinstance(value, Mapping):
        return _text(value, "answer", name)
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise SampleError(f"{name}: field 'answer' cannot be written as JSON ({error}); write it as a text") from error
    return _text(text, "answer", name)


def _images(value: Any, name: str) -> list[str]:
    if value is None:
        return []
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, list | tuple):
        raise SampleError(f"{name}: field 'images' must be a list of names, not {_kind(value)}")
    return [_text(item, f"images[{index}]", name) for index, item in enumerate(items)]


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    kinds = {int: "a number", float: "a number", str: "a text", list: "a list", tuple: "a list", dict: "an object"}
    return kinds.get(type(value), f"a value of type {type(value).__name__}")
