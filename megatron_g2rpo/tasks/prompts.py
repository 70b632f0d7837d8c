# SPDX-License-Identifier: Apache-2.0
"""From a sample to the chat that asks it."""

from __future__ import annotations

from typing import Any

from megatron_g2rpo.tasks.response_formats import ResponseFormat
from megatron_g2rpo.types import Sample

Message = dict[str, Any]


def build_messages(
    sample: Sample, system_prompt: str | None = None, response_format: ResponseFormat | None = None
) -> list[Message]:
    """Chat messages of a sample: the system prompt if there is one, then one user turn, images before the question.

    Images appear as ``{"type": "image"}`` only; the pixels travel beside the messages, in the same order.

    Args:
        sample: what is asked.
        system_prompt: text of the system turn; None for none.
        response_format: whose instruction the chat carries, as a paragraph after the system prompt or after the
            question; None for no instruction.
    """
    system, question = [system_prompt] if system_prompt is not None else [], [sample.question]
    if response_format is not None and response_format.instruction:
        (system if response_format.placement == "system" else question).append(response_format.instruction)
    content: list[Message] = [{"type": "image"} for _ in sample.images]
    content.append(_text(question))
    turns: list[Message] = []
    if system:
        turns.append({"role": "system", "content": [_text(system)]})
    turns.append({"role": "user", "content": content})
    return turns


def continuation(response: str, prefix: str) -> str:
    """What is left to say of a whole response where the prompt ends with its beginning: no tag is learned twice.

    Args:
        response: of a dataset.
        prefix: what the chat template has written of it (``Prompt.response_prefix``), white space around it included.
    """
    return response.removeprefix(prefix if response.startswith(prefix) else prefix.strip())


def _text(paragraphs: list[str]) -> Message:
    return {"type": "text", "text": "\n\n".join(paragraphs)}
