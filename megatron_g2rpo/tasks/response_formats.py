# SPDX-License-Identifier: Apache-2.0
"""Response formats: what a prompt asks a response to look like, and where thinking and answer are found in it.

Register one in a file that the recipe's ``imports`` names; an instance such as ``Tagged(...)`` can be registered, too:

    @response_format("hashes")
    class Hashes(ResponseFormat):
        instruction = "Think first. End with the answer after ####."

        def find_thinking(self, text: str) -> str | None:
            return text.rpartition("####")[0].strip() or None

        def find_answer(self, text: str) -> str | None:
            return text.rpartition("####")[2].strip() if "####" in text else None

        def is_well_formed(self, text: str) -> bool:
            return text.count("####") == 1
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from typing import Literal

from megatron_g2rpo import registry
from megatron_g2rpo.recipe import Env
from megatron_g2rpo.tasks.boxed import find_boxed, last_box
from megatron_g2rpo.types import Response, Rollout

register = registry.response_formats.register


class ResponseFormat(ABC):
    """The base class of response formats, which says how responses are laid out.

    The methods get the text of a response; if the prompt already contains its ``opening``, the text begins with it.

    Attributes:
        instruction: text in the prompt that tells the model of the format; ``""`` for no text.
        placement: where the instruction stands: after the ``question``, as a paragraph of its own, or at the end of
            the ``system`` prompt.
        opening: text that a response begins with and that a chat template may have written into the prompt already,
            such as ``<think>``: it then counts as present. ``""`` for no such text.
    """

    instruction: str
    placement: Literal["question", "system"] = "question"
    opening: str = ""

    @abstractmethod
    def find_thinking(self, text: str) -> str | None:
        """Return the reasoning in a response; None if there is none."""

    @abstractmethod
    def find_answer(self, text: str) -> str | None:
        """Return the final answer in a response; None if there is none."""

    @abstractmethod
    def is_well_formed(self, text: str) -> bool:
        """Return whether a response follows the format in full."""

    def read(self, rollout: Rollout) -> Response:
        """Read the response of a rollout in this format."""
        text = self.begun(rollout.prompt.response_prefix) + rollout.text
        return Response(
            text=rollout.text,
            thinking=self.find_thinking(text),
            answer=self.find_answer(text),
            is_well_formed=self.is_well_formed(text),
            num_tokens=len(rollout.response_ids),
            truncated=rollout.truncated,
            sample_index=rollout.sample_index,
        )

    def begun(self, prefix: str) -> str:
        """Return the part of the prompt's end that belongs to this format; a tag of another format does not."""
        start = prefix.rfind(self.opening) if self.opening else -1
        return prefix[start:] if start >= 0 else ""


def get(name: str) -> ResponseFormat:
    """Return the response format that is registered under a name.

    Raises:
        ValueError: the name is unknown; the message lists the known ones.
    """
    value = registry.response_formats.get(name)
    return value() if isinstance(value, type) else value


def by_task(env: Env, default: str) -> dict[str, ResponseFormat]:
    """Return task -> response format.

    Args:
        env: the recipe's ``env`` section.
        default: name of the format for tasks that name none.

    Raises:
        ValueError: a name is unknown; the message lists the known ones.
    """
    return {name: get(task.response_format or default) for name, task in env.tasks.items()}


def _section(tag: str) -> re.Pattern[str]:
    """Return a pattern for the text between a pair of tags, without another opening tag in it."""
    opening, closing = re.escape(f"<{tag}>"), re.escape(f"</{tag}>")
    return re.compile(f"{opening}((?:(?!{opening}).)*?){closing}", re.DOTALL)


class Tagged(ResponseFormat):
    """The format ``<thinking>...</thinking><answer>...</answer>``, with tags of any name.

    A response is well formed if it has each tag exactly once, in this order, and only white space before, between and
    after the sections. The answer is the text of the last complete answer section, the thinking is that of the first
    complete thinking section; both are stripped.

    Args:
        thinking: name of the tag around the thinking.
        answer: name of the tag around the answer.
    """

    def __init__(self, *, thinking: str, answer: str) -> None:
        self._tags = tags = [f"<{thinking}>", f"</{thinking}>", f"<{answer}>", f"</{answer}>"]
        self._thinking, self._answer = _section(thinking), _section(answer)
        self.opening = tags[0]
        self.instruction = (
            f"First think about the question, step by step, between {tags[0]} and {tags[1]}. Then give the final "
            f"answer, and nothing else, between {tags[2]} and {tags[3]}."
        )

    def find_thinking(self, text: str) -> str | None:
        found = self._thinking.search(text)
        return found.group(1).strip() if found else None

    def find_answer(self, text: str) -> str | None:
        found = self._answer.findall(text)
        return found[-1].strip() if found else None

    def is_well_formed(self, text: str) -> bool:
        if any(text.count(tag) != 1 for tag in self._tags):
            return False
        whole = text.strip()
        begin, end, answer_begin, answer_end = self._tags
        after = whole.partition(end)[2]
        # Each is there once: where the answer's tag follows with nothing but space before it, the order is right too.
        return whole.startswith(begin) and after.lstrip().startswith(answer_begin) and whole.endswith(answer_end)


register("thinking_answer")(Tagged(thinking="thinking", answer="answer"))
register("think_answer")(Tagged(thinking="think", answer="answer"))


@register("think_boxed")
class ThinkBoxed(ResponseFormat):
    r"""The format ``<think>...</think>``, followed by text with the answer in ``\boxed{}``.

    A response is well formed if it begins with its only thinking section and has a complete box after it. A box inside
    the thinking is no answer.
    """

    opening = "<think>"
    instruction = (
        "First think about the question, step by step, between <think> and </think>. Then give the final answer in "
        "\\boxed{}."
    )

    def find_thinking(self, text: str) -> str | None:
        found = _section("think").search(text)
        return found.group(1).strip() if found else None

    def find_answer(self, text: str) -> str | None:
        if "<think>" in text and "</think>" not in text:
            return None  # it never stopped thinking
        return find_boxed(text.rpartition("</think>")[2])

    def is_well_formed(self, text: str) -> bool:
        if text.count("<think>") != 1 or text.count("</think>") != 1 or not text.lstrip().startswith("<think>"):
            return False
        return find_boxed(text.partition("</think>")[2]) is not None


@register("boxed")
class Boxed(ResponseFormat):
    r"""The format of a text with the answer in ``\boxed{}``; the text before the answer is the thinking."""

    instruction = "Think about the question, step by step, and give the final answer in \\boxed{}."

    def find_thinking(self, text: str) -> str | None:
        box = last_box(text)
        return text[: box[0]].strip() if box else None

    def find_answer(self, text: str) -> str | None:
        return find_boxed(text)

    def is_well_formed(self, text: str) -> bool:
        return find_boxed(text) is not None


@register("plain")
class Plain(ResponseFormat):
    """The format in which the whole text is the answer: every response is well formed, and there is no thinking."""

    instruction = "Give the final answer, and nothing else."

    def find_thinking(self, text: str) -> str | None:
        return None

    def find_answer(self, text: str) -> str | None:
        return text.strip() or None

    def is_well_formed(self, text: str) -> bool:
        return True
