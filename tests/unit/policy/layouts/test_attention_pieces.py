# SPDX-License-Identifier: Apache-2.0
"""Claims: the ranks' pieces are every real token once, with all keys up to it; a bucket at most doubles them."""

from __future__ import annotations

from itertools import accumulate

from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_g2rpo.policy.layouts.attention_pieces import buckets_of, pieces_of_row


@settings(max_examples=200)
@given(data=st.data(), size=st.sampled_from([1, 2, 3]))
def test_pieces_hold_every_real_token_once(data: st.DataObject, size: int) -> None:
    chunks = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    padded = [2 * size * chunk for chunk in chunks]
    lengths = [data.draw(st.integers(0, tokens)) for tokens in padded]
    offsets = [0, *accumulate(padded)]
    seen, own = [], []
    for rank in range(size):
        pieces = pieces_of_row(lengths, offsets, size, rank)
        for piece in pieces:
            assert piece.keys == piece.first + piece.length
            seen += [piece.start + piece.first + token for token in range(piece.length)]
            own += [(rank, piece.token + token) for token in range(piece.length)]
        for bucket in buckets_of(pieces):
            for part in bucket:
                assert max(each.length for each in bucket) < 2 * part.length or part.length == 1
                assert max(each.keys for each in bucket) < 2 * part.keys or part.keys == 1
        assert sum(len(bucket) for bucket in buckets_of(pieces)) == len(pieces)
    real = [start + token for start, length in zip(offsets, lengths, strict=False) for token in range(length)]
    assert sorted(seen) == real
    assert len(set(own)) == len(own)
    assert all(token < offsets[-1] // size for _, token in own)
