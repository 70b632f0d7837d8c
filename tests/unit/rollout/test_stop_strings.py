# SPDX-License-Identifier: Apache-2.0
"""Stop strings: found across tokens, by the same rule in every engine."""

from __future__ import annotations

import random

import pytest

from megatron_g2rpo.rollout.stop_strings import Tail, read_response, until_stop

END = 0


def decode(token_ids: list[int]) -> str:
    """Every token is one byte of UTF-8, so that characters are made up of several tokens."""
    return bytes(token_ids).decode(errors="replace")


def tokens_of(text: str) -> list[int]:
    return list(text.encode())


@pytest.mark.parametrize(
    ("text", "stop_strings", "expected"),
    [
        ("a <answer>4</answer>", ("</answer>",), "a <answer>4</answer>"),
        ("a <answer>4</answer> and more", ("</answer>",), "a <answer>4</answer>"),
        ("one two three", ("three", "two"), "one two"),
        ("nothing here", ("</answer>",), None),
        ("", ("x",), None),
        ("no stop strings", (), None),
        ("stop \ufffd", ("stop",), None),
    ],
)
def test_the_text_ends_with_the_stop_string_that_is_completed_first(text, stop_strings, expected):
    assert until_stop(text, stop_strings) == expected


def test_a_response_is_truncated_unless_an_end_token_or_a_stop_string_ended_it():
    options = {"eos_token_ids": {END}, "stop_strings": ("stop",), "decode": decode}
    assert read_response(tokens_of("some text"), **options) == ("some text", True)
    assert read_response([*tokens_of("some text"), END], **options) == ("some text", False)
    assert read_response(tokens_of("some stop"), **options) == ("some stop", False)


@pytest.mark.parametrize("stop_strings", [("</answer>",), ("äöü", "zz"), ("q",)])
def test_the_tail_of_a_long_response_stops_at_the_token_that_completes_a_stop_string(stop_strings):
    """Against a search of the whole text after each token, in texts of thousands of tokens."""
    generator = random.Random(0)
    for _ in range(5):
        noise = "".join(generator.choices("abäö</answer", k=generator.randrange(3000)))
        noise = noise.replace("äöü", "").replace("</answer>", "")
        tokens = tokens_of(noise + generator.choice(stop_strings) + "tail")
        tail = Tail(stop_strings, decode)
        stopped = next(index for index, token in enumerate(tokens) if tail.completes(token))
        # In one-byte tokens a text is complete where the search of its bytes first succeeds.
        expected = min(end for stop in stop_strings if (end := _end_of(tokens, tokens_of(stop))) >= 0)
        assert stopped == expected
        assert len(tail._token_ids) < 200, "a step must not read all of the response again"


def _end_of(tokens: list[int], stop: list[int]) -> int:
    found = bytes(tokens).find(bytes(stop))
    return found + len(stop) - 1 if found >= 0 else -1
