# SPDX-License-Identifier: Apache-2.0
"""Reward parts: functions that each judge one aspect of a response, found by the name that recipes weigh them with.

A part is a function of a sample and a response that returns a finite number, 0 where it does not apply. It may take the
keyword-only parameter ``settings``, the recipe's settings for the sample's task; its other keyword-only parameters are
its options, ``env.reward_options``. Under ``batched=True``, which suits a judge model, it is a function of a list of
samples and a list of responses, and returns a list, in which an exception stands for a value that there is not.

Where a part raises, hangs or returns no finite number, the response has no reward and is left out of loss and group.

Register one in a file that the recipe's ``imports`` names, and weigh it, ``env.reward_weights: {brevity: 0.1}``:

    @reward_part("brevity")
    def brevity(sample: Sample, response: Response) -> float:
        return 1.0 / (1.0 + len(response.thinking or ""))
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from megatron_g2rpo import registry
from megatron_g2rpo.recipe import Trapezoid
from megatron_g2rpo.tasks.shaping import overlong_penalty, trapezoid
from megatron_g2rpo.types import Response, Sample

register = registry.reward_parts.register


class BadReference(ValueError):
    """The reference of a sample cannot be read: the dataset is wrong, whatever the response."""


@dataclass(frozen=True, kw_only=True)
class PartSettings:
    """The recipe's settings for the task of a sample.

    Attributes:
        answer_format: name of the answer format of all samples of the task; None: the one that each sample names.
        length: corners of the length reward, in response tokens; None: no length reward.
        max_response_tokens: largest number of tokens that a response can have.
        overlong_buffer: number of tokens before that limit over which ``overlong`` falls to -1; None where the recipe
            has none.
    """

    answer_format: str | None
    length: Trapezoid | None
    max_response_tokens: int
    overlong_buffer: int | None

    def answer_format_of(self, sample: Sample) -> str:
        """Return the name of the answer format that a sample is scored with."""
        return self.answer_format or sample.answer_format


@register("accuracy")
def accuracy(sample: Sample, response: Response, *, settings: PartSettings) -> float:
    """Return how right the answer is, 0 to 1, by its answer format; 0 for a response without an answer.

    Raises:
        BadReference: unknown answer format, or a reference that it cannot read.
        Exception: the answer format raises for this answer, but not for an empty one.
    """
    name = settings.answer_format_of(sample)
    if name not in registry.answer_formats:
        raise BadReference(registry.answer_formats.unknown(name))
    function = registry.answer_formats.get(name)
    try:
        # Called without an answer, too: a broken reference must not hide behind malformed responses.
        value = function(response.answer if response.answer is not None else "", sample)
    except Exception:
        _check_reference(sample, function)
        raise
    if math.isfinite(value) and not 0.0 <= value <= 1.0:
        raise ValueError(f"answer format {name!r} returned {value}, not a number in [0, 1]")
    return value if response.answer is not None else 0.0


def _check_reference(sample: Sample, function: Callable[[str, Sample], float]) -> None:
    """Raise ``BadReference`` if an answer format refuses the reference: it does so whatever the answer."""
    try:
        function("", sample)
    except ValueError as error:
        raise BadReference(str(error)) from error


@register("format")
def well_formed(sample: Sample, response: Response) -> float:
    """Return 1 if the response is well formed in its response format, else 0."""
    return float(response.is_well_formed)


@register("length")
def length(sample: Sample, response: Response, *, settings: PartSettings) -> float:
    """Return the length reward by the corners of the task's ``length``; 0 for a task without them."""
    bounds = settings.length
    if bounds is None:
        return 0.0
    return trapezoid(response.num_tokens, bounds.start, bounds.peak_start, bounds.peak_end, bounds.end)


@register("structure")
def structure(sample: Sample, response: Response) -> float:
    """Return 1 if the answer is JSON of the reference's form; 0 where the reference is neither object nor list.

    The answer has the form of a list if it is a list of as many elements, and that of an object if it has its keys.
    Where values of the object are objects themselves (a box for each frame), the form gives one half of the value, and
    the overlap of their keys (intersection over union) gives the other half. A response that is not well formed gets 0.

    Source: the structure bonus of the paper's public code, scaled from [0, 0.5] to [0, 1]; its code gives a constant
    where the reference is no JSON.
    """
    wanted, got = _json(sample.answer), _json(response.answer or "")
    if not response.is_well_formed or not isinstance(got, type(wanted)):
        return 0.0
    if isinstance(wanted, list):
        return float(len(got) == len(wanted))
    if not isinstance(wanted, dict) or got.keys() != wanted.keys():
        return 0.0
    inner = {(key, name) for key, value in wanted.items() if isinstance(value, dict) for name in value}
    if not inner:
        return 1.0
    found = {(key, name) for key, value in got.items() if isinstance(value, dict) for name in value}
    return 0.5 + 0.5 * len(inner & found) / len(inner | found)


@register("overlong")
def overlong(sample: Sample, response: Response, *, settings: PartSettings) -> float:
    """Return a penalty: 0 up to ``grpo.overlong_penalty.buffer`` tokens before the limit, falling to -1 at the limit.

    Raises:
        ValueError: the recipe has no such buffer.
    """
    if settings.overlong_buffer is None:
        raise ValueError("needs grpo.overlong_penalty.buffer, which only a recipe for `train` has")
    return overlong_penalty(response.num_tokens, settings.max_response_tokens, settings.overlong_buffer)


def _json(text: str) -> Any:
    """Parse a text as a JSON object or list; None for any other text."""
    try:
        value = json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):  # recursion: a response may repeat `[` for long
        return None
    return value if isinstance(value, dict | list) else None


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not JSON")
