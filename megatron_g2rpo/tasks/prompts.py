# SPDX-License-Identifier: Apache-2.0
"""Chat messages that ask a sample's question."""

from __future__ import annotations

from typing import Any

from megatron_g2rpo.tasks.response_formats import ResponseFormat
from megatron_g2rpo.types import Sample

Message = dict[str, Any]

# Where a question has it, an image is shown there.
IMAGE_TAG = "<image>"


def build_messages(
    sample: Sample, system_prompt: str | None = None, response_format: ResponseFormat | None = None
) -> list[Message]:
    """Return the chat messages of a sample: a system turn if there is a text for it, then one user turn.

    Images appear as ``{"type": "image"}`` only, each in the place of an ``<image>`` of the question, or all before the
    question where it has none; their pixels are passed on beside the messages, in the same order.

    Args:
        sample: the sample to ask.
        system_prompt: text of the system turn; None for no such text.
        response_format: format whose instruction the chat contains, as a paragraph after the system prompt or after
            the question; None for no instruction.

    Raises:
        ValueError: the question has ``<image>`` tags, but not as many as the sample has images.
    """
    first, *others = sample.question.split(IMAGE_TAG)
    if others and len(others) != len(sample.images):
        raise ValueError(f"the question has {len(others)} {IMAGE_TAG} tags, but the sample {len(sample.images)} images")
    system, question = [system_prompt] if system_prompt is not None else [], [others[-1] if others else first]
    if response_format is not None and response_format.instruction:
        (system if response_format.placement == "system" else question).append(response_format.instruction)
    content: list[Message] = []
    if others:
        for text in (first, *others[:-1]):
            content += [_text([text])] if text else []
            content.append({"type": "image"})
    else:
        content += [{"type": "image"}] * len(sample.images)  # to iterate would decode them
    if any(question) or not others:
        content.append(_text(question))
    turns: list[Message] = []
    if system:
        turns.append({"role": "system", "content": [_text(system)]})
    turns.append({"role": "user", "content": content})
    return turns


def continuation(response: str, prefix: str) -> str:
    """Return the rest of a response whose beginning the prompt already contains, so that no tag is learned twice.

    Args:
        response: a whole response, as a dataset holds it.
        prefix: the beginning of the response that the chat template has written (``Prompt.response_prefix``), with
            white space around it.
    """
    return response.removeprefix(prefix if response.startswith(prefix) else prefix.strip())


def _text(paragraphs: list[str]) -> Message:
    return {"type": "text", "text": "\n\n".join(paragraphs)}
