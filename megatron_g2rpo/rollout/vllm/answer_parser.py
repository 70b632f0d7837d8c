# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
# (vLLM has an environment of its own; tests/vllm/contract holds what is used of it.)
"""A reasoning parser for vLLM's OpenAI-compatible server: a message's content is the answer, and nothing else.

Evaluation harnesses compare the whole content of a message with the reference. A policy that was trained on a response
format writes its thinking before the answer; this parser takes both apart by that format, as rewards do. Load it from a
file that the server is given as ``--reasoning-parser-plugin``, and name it by ``--reasoning-parser``:

    from megatron_g2rpo.rollout.vllm.answer_parser import register
    register("answers", response_format="thinking_answer")
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm.entrypoints.generate.base.protocol import DeltaMessage
from vllm.reasoning import ReasoningParser, ReasoningParserManager

from megatron_g2rpo.tasks import response_formats


def register(name: str, *, response_format: str, response_prefix: str = "") -> None:
    """Make a response format known to vLLM as a reasoning parser.

    Args:
        name: name for ``--reasoning-parser``.
        response_format: name of the response format.
        response_prefix: what the chat template writes of every response itself, see ``types.Prompt``.

    Raises:
        ValueError: nobody registered the response format.
    """
    layout = response_formats.get(response_format)
    begun = layout.begun(response_prefix)

    class AnswerParser(ReasoningParser):
        """The reasoning parser of one response format."""

        def is_reasoning_end(self, input_ids: Sequence[int]) -> bool:
            return True  # only structured output asks, and it may constrain the whole response

        def extract_content_ids(self, input_ids: list[int]) -> list[int]:
            return input_ids

        def extract_reasoning(self, model_output: str, request: Any) -> tuple[str | None, str | None]:
            """Return thinking and answer of a response; a response without an answer has the content ``""``."""
            text = begun + model_output
            return layout.find_thinking(text), layout.find_answer(text) or ""

        def extract_reasoning_streaming(
            self,
            previous_text: str,
            current_text: str,
            delta_text: str,
            previous_token_ids: Sequence[int],
            current_token_ids: Sequence[int],
            delta_token_ids: Sequence[int],
        ) -> DeltaMessage | None:
            # Where the answer begins is known at the end alone: a later tag may start it anew.
            raise ValueError("an answer is found in a whole response: ask without stream=True")

    ReasoningParserManager.register_module(name, force=True, module=AnswerParser)
