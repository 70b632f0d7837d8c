# SPDX-License-Identifier: Apache-2.0
"""Calls of reward parts, in this process or in a worker: what each returned, or why it has no value.

Nothing that a part does ends the run from here: what it raises, and a value that is no finite number, becomes a
``FailedReward``, never a reward of 0, from which the policy would learn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_g2rpo import registry
from megatron_g2rpo.tasks.reward_parts import BadReference, PartSettings
from megatron_g2rpo.types import FailedReward, Response, Sample

ACCURACY = "accuracy"

Options = Mapping[str, Mapping[str, Any]]
Outcome = float | FailedReward


@dataclass(frozen=True)
class Call:
    """What a part is asked of one response.

    Attributes:
        sample: the sample.
        response: a response to it, as its response format reads it.
        settings: the recipe's settings for the sample's task.
    """

    sample: Sample
    response: Response
    settings: PartSettings

    def failed(self, name: str, what: str, *, bad_sample: bool = False) -> FailedReward:
        """Return the failure of a part on this response.

        Args:
            name: name of the part.
            what: what happened, the end of a sentence that begins with part, sample, task and response.
            bad_sample: whether the sample is the cause.
        """
        part = f"{name} {self.settings.answer_format_of(self.sample)!r}" if name == ACCURACY else name
        of = f"sample {self.sample.key}, task {self.sample.task!r}, response {self.response.sample_index}"
        return FailedReward(part=name, message=f"reward {part} of {of}: {what}", bad_sample=bad_sample)


@dataclass(frozen=True)
class Ask:
    """Parts that are asked of one response.

    Attributes:
        call: what each part is asked.
        parts: names of parts that are not batched, in the order in which they are asked.
    """

    call: Call
    parts: tuple[str, ...]


def is_batched(name: str) -> bool:
    """Return whether a part is asked of many responses at once.

    Raises:
        ValueError: nobody registered the part.
    """
    return bool(registry.reward_parts.entry(name).facts.get("batched", False))


def ask(name: str, call: Call, options: Options) -> Outcome:
    """Return the value of a part for one response.

    Args:
        name: name of a part that is not batched.
        call: what it is asked.
        options: part -> its options.
    """
    keywords = _keywords(name, options, lambda: call.settings)
    try:
        return _number(registry.reward_parts.get(name)(call.sample, call.response, **keywords), name, call)
    except BadReference as error:
        return call.failed(name, raised(error.__cause__ or error), bad_sample=True)
    except (Exception, SystemExit) as error:  # noqa: BLE001 (a registered part may raise anything)
        return call.failed(name, raised(error))


def ask_in_turn(asked: Ask, options: Options) -> list[Outcome]:
    """Return the values of parts for one response; the first that fails is the last that is asked.

    Args:
        asked: the parts, and what each is asked.
        options: part -> its options.
    """
    outcomes: list[Outcome] = []
    for name in asked.parts:
        outcomes.append(ask(name, asked.call, options))
        if isinstance(outcomes[-1], FailedReward):
            break
    return outcomes


def ask_batch(name: str, calls: Sequence[Call], options: Options) -> list[Outcome]:
    """Return the values of a batched part. Where the call as a whole fails, it has failed for every response.

    Args:
        name: name of a batched part.
        calls: what it is asked, at least one call.
        options: part -> its options.
    """
    keywords = _keywords(name, options, lambda: [call.settings for call in calls])
    try:
        returned = registry.reward_parts.get(name)(
            [call.sample for call in calls], [call.response for call in calls], **keywords
        )
        if isinstance(returned, str | bytes | Mapping):
            raise TypeError(f"returned {type(returned).__name__}, not a list of numbers")
        values = list(returned)
        if len(values) != len(calls):
            raise ValueError(f"returned {len(values)} numbers for {len(calls)} responses")
    except (Exception, SystemExit) as error:  # noqa: BLE001 (a registered part may raise anything)
        return failed_batch(name, calls, raised(error))
    return [_batched_number(value, name, call) for value, call in zip(values, calls, strict=True)]


def failed_batch(name: str, calls: Sequence[Call], what: str) -> list[Outcome]:
    """Return the failures of all responses of a call of a batched part.

    Args:
        name: name of the part.
        calls: what it was asked.
        what: what happened.
    """
    return [call.failed(name, f"{what} (asked for {len(calls)} responses at once)") for call in calls]


def raised(error: BaseException) -> str:
    """Return what is said of an exception in the message of a failure."""
    try:
        said = str(error)
    except Exception:  # noqa: BLE001 (an exception of a user's own)
        said = "(its message cannot be made a text)"
    return f"raised {type(error).__name__}: {said}"


def _keywords(name: str, options: Options, settings: Callable[[], Any]) -> dict[str, Any]:
    taken = {"settings": settings()} if registry.reward_parts.takes(name, "settings") else {}
    return {**options.get(name, {}), **taken}


def _batched_number(value: Any, name: str, call: Call) -> Outcome:
    if isinstance(value, Exception):
        return call.failed(name, raised(value))
    try:
        return _number(value, name, call)
    except Exception as error:  # noqa: BLE001 (what a part returned may raise anything when it is made a number)
        return call.failed(name, raised(error))


def _number(value: Any, name: str, call: Call) -> Outcome:
    number = float(value)
    return number if math.isfinite(number) else call.failed(name, f"returned {number}, which is not a finite number")
