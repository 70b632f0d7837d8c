# SPDX-License-Identifier: Apache-2.0
"""Claims: chunks of logits cover every token and every column once, and hold no more than was asked for."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_g2rpo.policy.layouts.logit_chunks import LogitChunks


def numbers(parts: list[slice]) -> list[int]:
    return [number for part in parts for number in range(part.start, part.stop)]


@settings(max_examples=200)
@given(tokens=st.integers(0, 3000), chunk_size=st.none() | st.integers(1, 4000), width=st.integers(1, 500))
def test_chunks_cover_everything_once(tokens: int, chunk_size: int | None, width: int) -> None:
    chunks = LogitChunks.of(tokens, chunk_size)
    assert numbers(chunks.of_tokens()) == list(range(tokens))
    assert numbers(chunks.of_vocabulary(width)) == (list(range(width)) if tokens else [])
    # The last chunk of the forward pass is what is kept for the backward pass, if anything is.
    if chunks.kept:
        last = chunks.of_tokens()[-1]
        assert last.stop - last.start == chunks.forward == chunks.kept


@settings(max_examples=200)
@given(tokens=st.integers(1, 3000), chunk_size=st.integers(2, 4000), width=st.integers(1, 500))
def test_no_more_logits_are_held_than_asked_for(tokens: int, chunk_size: int, width: int) -> None:
    chunks = LogitChunks.of(tokens, chunk_size)
    assert chunks.forward <= chunk_size
    columns = max(part.stop - part.start for part in chunks.of_vocabulary(width))
    # One column of all tokens is the least that the backward pass can take.
    assert tokens * columns <= max(chunks.backward * width, tokens)
    assert chunks.kept + chunks.backward <= chunk_size
