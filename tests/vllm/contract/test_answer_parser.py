# SPDX-License-Identifier: Apache-2.0
"""The reasoning parser of a response format is one of vLLM's, and its chat endpoint takes messages apart with it."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
from transformers import AutoTokenizer
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.parser.parser_manager import ParserManager
from vllm.reasoning import ReasoningParser, ReasoningParserManager

from megatron_g2rpo import registry
from megatron_g2rpo.rollout.vllm.answer_parser import register
from tests.common.builtin import builtin_names
from tests.vllm.common import POLICY

NAME = "answers_of_a_test"
REQUEST = ChatCompletionRequest(messages=[{"role": "user", "content": "?"}], model="policy")
# Response format -> a whole response, its thinking and its answer.
WHOLE = {
    "thinking_answer": ("<thinking>3 + 4</thinking><answer>7</answer>", "3 + 4", "7"),
    "think_answer": ("<think>3 + 4</think>\n<answer> 7 </answer>", "3 + 4", "7"),
    "think_boxed": ("<think>3 + 4</think>It is \\boxed{7}.", "3 + 4", "7"),
    "boxed": ("3 + 4 is \\boxed{7}", "3 + 4 is", "7"),
    "plain": ("7", None, "7"),
}


def parsed(response: str, response_format: str, prefix: str = "") -> tuple[str | None, str | None]:
    """Thinking and content of the message that the chat endpoint makes of a response."""
    register(NAME, response_format=response_format, response_prefix=prefix)
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    parser = ParserManager.get_parser(reasoning_parser_name=NAME, tokenizer=tokenizer)
    assert parser is not None
    thinking, content, calls = parser(tokenizer).parse(response, REQUEST)
    assert not calls
    return thinking, content


def test_every_response_format_of_ours_is_tried() -> None:
    assert builtin_names(registry.response_formats) == WHOLE.keys()


@pytest.mark.parametrize("response_format", WHOLE)
def test_a_message_is_the_answer_and_its_reasoning_the_thinking(response_format: str) -> None:
    response, thinking, answer = WHOLE[response_format]
    assert parsed(response, response_format) == (thinking, answer)


@pytest.mark.parametrize("response_format", ["thinking_answer", "think_answer", "think_boxed"])
@pytest.mark.parametrize("before", ["", "<|im_start|>assistant\n"])
def test_what_the_chat_template_has_written_counts(response_format: str, before: str) -> None:
    response, thinking, answer = WHOLE[response_format]
    opening, _, rest = response.partition(">")
    assert parsed(rest, response_format, f"{before}{opening}>\n") == (thinking, answer)
    # Without it, the thinking has no beginning.
    assert parsed(rest, response_format) == (None, answer)


def test_a_response_without_an_answer_has_empty_content() -> None:
    """Not None, which harnesses take for an error, nor the thinking, which a reference may occur in."""
    assert parsed("<thinking>it is 7", "thinking_answer") == (None, "")


def test_the_parser_is_registered_and_implements_what_is_abstract() -> None:
    register(NAME, response_format="boxed")
    register(NAME, response_format="plain")  # the later one replaces it, as its signature says
    found = ReasoningParserManager.get_reasoning_parser(NAME)
    assert issubclass(found, ReasoningParser)
    abstract = [name for name, each in vars(ReasoningParser).items() if getattr(each, "__isabstractmethod__", False)]
    assert "extract_reasoning" in abstract
    for name in abstract:
        ours, theirs = (inspect.signature(getattr(owner, name)).parameters for owner in (found, ReasoningParser))
        assert name in vars(found), name
        assert [*ours] == [*theirs], name


def test_the_server_reads_the_parser_from_a_file(tmp_path: Path) -> None:
    """As ``--reasoning-parser-plugin`` does."""
    plugin = tmp_path / "plugin.py"
    plugin.write_text(f"from megatron_g2rpo.rollout.vllm.answer_parser import register\nregister('{NAME}_file', "
                      "response_format='boxed')\n")  # fmt: skip
    ReasoningParserManager.import_reasoning_parser(str(plugin))
    assert f"{NAME}_file" in ReasoningParserManager.list_registered()


def test_the_chat_endpoint_composes_the_parser_and_asks_it() -> None:
    assert "ParserManager.get_parser(" in inspect.getsource(OpenAIServingChat.__init__)
    assert "parser.parse(" in inspect.getsource(OpenAIServingChat.chat_completion_full_generator)


def test_streaming_is_refused() -> None:
    register(NAME, response_format="boxed")
    parser = ReasoningParserManager.get_reasoning_parser(NAME)(AutoTokenizer.from_pretrained(POLICY))
    with pytest.raises(ValueError, match="without stream=True"):
        parser.extract_reasoning_streaming("", "a", "a", [], [1], [1])
