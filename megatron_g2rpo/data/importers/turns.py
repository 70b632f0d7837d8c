# SPDX-License-Identifier: Apache-2.0
"""Conversations: one question, and one answer to it, out of the turns of a chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from megatron_g2rpo.data.importers.base import Refusal
from megatron_g2rpo.data.importers.values import images_of, is_missing
from megatron_g2rpo.tasks.prompts import IMAGE_TAG

# What becomes of a row's own system message: samples have none, the recipe has one for all (data.system_prompt).
System = Literal["refuse", "drop"]

_ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}


@dataclass(kw_only=True)
class Turn:
    """One turn: ``role`` is user, assistant or system; ``images`` are those that its own content holds."""

    role: str
    text: str
    images: list[bytes | Path] = field(default_factory=list)


def turns_of(messages: Any, name: str, role: str = "role", content: str = "content") -> list[Turn]:
    """Return the turns of a list of messages.

    The content of a message is text, or a list of parts as OpenAI's interface has them; an image among the parts
    becomes the tag ``<image>`` in the text.

    Args:
        messages: list of objects.
        name: name of the row.
        role: field of a message that names its role.
        content: field of a message with its content.

    Raises:
        Refusal: there is something else in the list, an unknown role, or content that is neither text nor image.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise Refusal(name, "the conversation is no list of messages", repr(messages)[:80])
    turns = []
    for message in messages:
        if not isinstance(message, Mapping):
            raise Refusal(name, "the conversation is no list of messages", repr(message)[:80])
        kind = _ROLES.get(str(message.get(role)))
        if kind is None:
            raise Refusal(name, f"a turn of the role {message.get(role)!r}; user, assistant and system are read")
        turns.append(_turn(kind, message.get(content), name))
    return turns


def question_of(turns: Sequence[Turn], name: str, system: System) -> Turn:
    """Return the user's turn of a conversation that consists of it.

    Raises:
        Refusal: there are other turns, or a system turn that is not to be dropped.
    """
    rest = _without_system(turns, name, system)
    if [turn.role for turn in rest] != ["user"]:
        raise Refusal(name, "several turns; a sample is one question", ", ".join(turn.role for turn in rest))
    return rest[0]


def exchange_of(turns: Sequence[Turn], name: str, system: System) -> tuple[Turn, str]:
    """Return the user's turn and the assistant's text of a conversation that consists of these two.

    Raises:
        Refusal: there are other turns, a system turn that is not to be dropped, or an answer that is no plain text.
    """
    rest = _without_system(turns, name, system)
    if [turn.role for turn in rest] != ["user", "assistant"]:
        reason = "not one question and one answer; conversations of several turns are not supported"
        raise Refusal(name, reason, ", ".join(turn.role for turn in rest))
    if rest[1].images or not rest[1].text.strip():
        raise Refusal(name, "the assistant's turn must be text that is not empty")
    return rest[0], rest[1].text


def shown_images(turn: Turn, column: Any, name: str) -> list[bytes | Path]:
    """Return the images of a turn: those of its own content, or those of a column of the row's.

    Raises:
        Refusal: both have some.
    """
    beside = images_of(column, name)
    if turn.images and beside:
        raise Refusal(name, "images both in the messages and beside them")
    return turn.images or beside


def _without_system(turns: Sequence[Turn], name: str, system: System) -> list[Turn]:
    spoken = [turn for turn in turns if turn.role != "system"]
    if len(spoken) < len(turns) and system == "refuse":
        raise Refusal(
            name, "a system message; set data.system_prompt in the recipe, and leave this one out with system=drop"
        )
    return spoken


def _turn(role: str, content: Any, name: str) -> Turn:
    turn = Turn(role=role, text="")
    if isinstance(content, str):
        turn.text = content
        return turn
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise Refusal(name, "the content of a message is neither text nor a list of parts", repr(content)[:80])
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            turn.text += part["text"]
        elif kind in ("image", "image_url"):
            turn.text += IMAGE_TAG
            held = [
                part[key] for key in ("image", "image_url", "bytes", "path", "url") if not is_missing(part.get(key))
            ]
            turn.images += images_of(held[:1], name)
        else:
            raise Refusal(name, f"a part of a message is neither text nor image, but {kind!r}")
    return turn
