# SPDX-License-Identifier: Apache-2.0
"""From a sample to the chat that asks it."""

from __future__ import annotations

from typing import Any

from megatron_g2rpo.types import Sample

Message = dict[str, Any]


def build_messages(sample: Sample, system_prompt: str | None = None) -> list[Message]:
    """Chat messages of a sample: the system prompt if there is one, then one user turn, images before the question.

    Images appear as ``{"type": "image"}`` only; the pixels travel beside the messages, in the same order.
    """
    content: list[Message] = [{"type": "image"} for _ in sample.images]
    content.append({"type": "text", "text": sample.question})
    turns: list[Message] = []
    if system_prompt is not None:
        turns.append({"role": "system", "content": [{"type": "text", "text": system_prompt}]})
    turns.append({"role": "user", "content": content})
    return turns
