# SPDX-License-Identifier: Apache-2.0
"""Texts of a chat: checks of what people pass as messages, and tokens of texts that spell a reserved token.

A chat template writes reserved tokens (the end of a turn, an image's placeholder) between the texts of a chat, and the
whole is tokenised as one string. A text that happens to contain ``<|im_end|>`` would end the turn there. So what a text
spells of a reserved token is rendered as a character that stands in for it, and the stretch between two reserved tokens
of the template's own, in which it then stands, is tokenised as plain text. Tokenizers split at reserved tokens before
they do anything else, so the tokens of such a stretch do not depend on what is around it.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from megatron_g2rpo.data.errors import SampleError

Message = Mapping[str, Any]

# Characters for private use, which no text of a dataset should hold; one that it does hold is not taken.
_STAND_INS = range(0xF0000, 0xFFFFE)


class ChatText:
    """Tokenises rendered chats and single texts, with what they spell of reserved tokens as plain text.

    Args:
        tokenizer: the tokenizer; its special tokens are the reserved ones.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = {token.content: id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        reserved = "|".join(map(re.escape, sorted(self._special, key=len, reverse=True)))
        self._reserved = re.compile(f"({reserved or '(?!)'})")  # without any, a pattern that matches nothing

    def hide(self, messages: Sequence[Message], name: str) -> tuple[list[dict[str, Any]], dict[str, str]]:
        """Return messages in which one character stands for each reserved token of a text, and what stands for what.

        Args:
            messages: checked messages, see ``checked_messages``.
            name: name of the chat, with which error messages begin.

        Raises:
            SampleError: neighbouring text parts spell a reserved token together.
        """
        texts = _texts(messages)
        found = sorted({token for text in texts for token in self._reserved.findall(text)})
        free = (chr(code) for code in _STAND_INS if not any(chr(code) in text for text in texts))
        hidden = dict(zip(free, found, strict=False))
        turns = [_with_texts(message, lambda text: self._hide(text, hidden)) for message in messages]
        for turn in turns:
            if isinstance(turn["content"], list) and (split := self._reserved.search(_joined(turn["content"]))):
                raise SampleError(f"{name}: text parts spell the reserved token {split[0]} together; join the parts")
        return turns, hidden

    def encode(self, text: str, hidden: Mapping[str, str], name: str) -> list[int]:
        """Return the token ids of a rendered chat, with reserved tokens where the template has written them alone.

        Args:
            text: what the template made of messages that ``hide`` returned.
            hidden: what stands for what in it.
            name: name of the chat, with which error messages begin.

        Raises:
            SampleError: the tokenizer cannot spell a reserved token as plain text.
        """
        if not hidden:
            return self._tokenizer(text, add_special_tokens=False)["input_ids"]
        stand_ins = re.compile(f"[{''.join(hidden)}]")
        ids: list[int] = []
        as_it_is = ""
        for stretch in self._reserved.split(text):
            if stand_ins.search(stretch) is None:
                as_it_is += stretch
                continue
            ids += self._tokenizer(as_it_is, add_special_tokens=False)["input_ids"] if as_it_is else []
            ids += self._plain_ids(stand_ins.sub(lambda match: hidden[match[0]], stretch), name)
            as_it_is = ""
        return ids + (self._tokenizer(as_it_is, add_special_tokens=False)["input_ids"] if as_it_is else [])

    def encode_plain(self, text: str, name: str) -> list[int]:
        """Return the token ids of a text outside of any chat, all of it plain text.

        Raises:
            SampleError: the text is no valid Unicode, or the tokenizer cannot spell a reserved token as plain text.
        """
        _check_text(text, name)
        if self._reserved.search(text):
            return self._plain_ids(text, name)
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    @cached_property
    def _plain_tokenizer(self) -> Any:
        # A copy of its own: the switch is a state of the tokenizer, which other threads may be using.
        return copy.deepcopy(self._tokenizer)

    def _plain_ids(self, text: str, name: str) -> list[int]:
        ids = self._plain_tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if special := {token for token, id in self._special.items() if id in ids}:
            raise SampleError(
                f"{name}: the text contains the reserved token {min(special)}, which this tokenizer cannot spell as "
                "plain text; remove it"
            )
        return ids

    def _hide(self, text: str, hidden: Mapping[str, str]) -> str:
        stand_ins = {token: character for character, token in hidden.items()}
        return self._reserved.sub(lambda match: stand_ins[match[0]], text)


def checked_messages(messages: Iterable[Any], name: str) -> list[dict[str, Any]]:
    """Return chat messages after a check of their form.

    Args:
        messages: what should be ``{"role": ..., "content": ...}`` each, the content a text or a list of
            ``{"type": "text", "text": ...}`` and ``{"type": "image"}``.
        name: name of the chat, with which error messages begin.

    Raises:
        SampleError: they are of another form, a part is neither text nor image, or a text is no valid Unicode.
    """
    checked = []
    for number, message in enumerate(messages, start=1):
        where = f"{name}: message {number}"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise SampleError(f'{where}: expected {{"role": "user", "content": ...}} with a text as role')
        content = message.get("content")
        if isinstance(content, str):
            _check_text(content, where)
        elif isinstance(content, Sequence):
            for part in content:
                _check_part(part, where)
            content = list(content)
        else:
            kind = "null or missing" if content is None else f"a value of type {type(content).__name__}"
            raise SampleError(f"{where}: its content is {kind}; write a text or a list of parts")
        checked.append({**message, "content": content})
    return checked


def joined_text(message: Message, name: str) -> dict[str, Any]:
    """Return a message with its text parts joined to one string, for templates of models that read text alone.

    Raises:
        SampleError: a part is no text.
    """
    content = message["content"]
    if isinstance(content, str):
        return dict(message)
    if other := sorted({part["type"] for part in content} - {"text"}):
        raise SampleError(f"{name}: contains {', '.join(other)} parts, but the model reads text alone")
    return {**message, "content": "".join(part["text"] for part in content)}


def _check_part(part: Any, where: str) -> None:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(kind, str):
        raise SampleError(f'{where}: a part of its content is no {{"type": "text" or "image", ...}}')
    if kind not in ("text", "image"):
        raise SampleError(f"{where}: contains a {kind} part; only texts and images can be encoded")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise SampleError(f'{where}: a text part lacks its text; write {{"type": "text", "text": "..."}}')
        _check_text(part["text"], where)


def _check_text(text: str, where: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SampleError(
            f"{where}: its text is no valid Unicode: {text[error.start]!r} at character {error.start} is half of a "
            "surrogate pair; repair the text"
        ) from error


def _texts(messages: Sequence[Message]) -> list[str]:
    contents = (message["content"] for message in messages)
    return [
        text
        for content in contents
        for text in ([content] if isinstance(content, str) else [p["text"] for p in content if p["type"] == "text"])
    ]


def _with_texts(message: Message, change: Callable[[str], str]) -> dict[str, Any]:
    content = message["content"]
    if isinstance(content, str):
        return {**message, "content": change(content)}
    parts = [{**part, "text": change(part["text"])} if part["type"] == "text" else part for part in content]
    return {**message, "content": parts}


def _joined(content: Sequence[Mapping[str, Any]]) -> str:
    """Return the texts of a turn one after the other; a NUL where an image separates them."""
    return "".join(part["text"] if part["type"] == "text" else "\0" for part in content)
