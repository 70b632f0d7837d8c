# SPDX-License-Identifier: Apache-2.0
"""Claims: the zigzag split takes every token once and balances causal work; attention over shares is attention."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_g2rpo.policy import attention
from megatron_g2rpo.policy.attention import PackedCoreAttention
from megatron_g2rpo.policy.layouts import context_parallel
from megatron_g2rpo.policy.layouts.layout import Layout, token_multiples
from megatron_g2rpo.policy.packed_row import packed_row_params
from megatron_g2rpo.types import PackedBatch
from tests.common.parity import packer_for, random_sequences
from tests.common.tiny_model import tiny_config

SIZES = (1, 2, 3, 4)


def rows(size: int) -> list[PackedBatch]:
    config = tiny_config()
    sequence, row = token_multiples(Layout(context=size))
    packer = replace(packer_for(config), sequence_multiple=sequence, row_multiple=row)
    return packer.pack(random_sequences(config, samples=3), budget=120, num_bins=8)


def test_the_split_of_two_sequences_by_hand() -> None:
    offsets = torch.tensor([0, 8, 12], dtype=torch.int32)
    assert context_parallel.local_tokens(offsets, 2, 0).tolist() == [0, 1, 6, 7, 8, 11]
    assert context_parallel.local_tokens(offsets, 2, 1).tolist() == [2, 3, 4, 5, 9, 10]


@pytest.mark.parametrize("size", SIZES)
def test_shares_put_together_are_the_row(size: int) -> None:
    for batch in rows(size):
        batch = replace(batch, kept_ids=torch.stack([batch.labels, batch.labels + 1]))
        shares = [context_parallel.split(batch, size, rank) for rank in range(size)]
        places = context_parallel.gathered_places(batch.cu_seqlens_padded, size)
        for name in (
            "tokens",
            "labels",
            "position_ids",
            "segment_ids",
            "loss_mask",
            "vision_index",
            "token_weights",
            "kept_ids",
        ):
            whole = torch.cat([getattr(share, name) for share in shares], dim=-1)[..., places]
            assert torch.equal(whole, getattr(batch, name)), name
        assert sum(share.num_tokens for share in shares) == batch.num_tokens


@pytest.mark.parametrize("size", [2, 4])
def test_every_rank_has_the_same_causal_work(size: int) -> None:
    """Pairs of query and key, of sequences without padding: the reason for the zigzag."""
    offsets = torch.tensor([0, 16 * size, 40 * size], dtype=torch.int32)
    starts = torch.tensor([0] * 16 * size + [16 * size] * 24 * size)
    work = [
        int((tokens - starts[tokens] + 1).sum())
        for tokens in (context_parallel.local_tokens(offsets, size, rank) for rank in range(size))
    ]
    assert max(work) == min(work)


def test_a_row_that_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ValueError, match="6 tokens cannot be cut into 4 chunks"):
        context_parallel.local_tokens(torch.tensor([0, 6]), 2, 0)


def oracle(batch: PackedBatch, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One dense mask over the row, written down from segments: ``[S, H * D]``, zero on padding."""
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    same = (batch.segment_ids[:, None] == batch.segment_ids) & (batch.segment_ids >= 0)
    mask = same & torch.ones_like(same).tril()
    real = batch.segment_ids >= 0
    out = F.scaled_dot_product_attention(*(x.transpose(0, 1) for x in (q, k, v)), attn_mask=mask | ~real[:, None])
    return torch.where(real[:, None], out.transpose(0, 1).flatten(1), 0.0)


@pytest.mark.parametrize("size", SIZES)
def test_attention_of_the_shares_is_attention_of_the_row(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank in turn, the gather replaced by the concatenation that it stands for; outputs and gradients."""
    generator = torch.Generator().manual_seed(0)
    for batch in rows(size):
        length = len(batch.tokens)
        q, k, v = (torch.randn(length, heads, 8, generator=generator, requires_grad=True) for heads in (4, 2, 2))
        weight = torch.randn(length, 32, generator=generator)
        real = batch.segment_ids[:, None] >= 0  # an empty row's padding attends too; nobody looks at it
        expected = oracle(batch, q, k, v)
        expected_grads = torch.autograd.grad((expected * weight * real).sum(), (q, k, v))

        shares = [context_parallel.local_tokens(batch.cu_seqlens_padded, size, rank) for rank in range(size)]
        gathered = torch.stack((k, v), dim=1)[torch.cat(shares)]
        monkeypatch.setattr(
            attention, "gather_from_sequence_parallel_region", lambda *_, gathered=gathered, **__: gathered
        )
        out = torch.zeros(length, 32)
        for rank, tokens in enumerate(shares):
            core = PackedCoreAttention(
                config=SimpleNamespace(context_parallel_size=size),
                layer_number=1,
                attn_mask_type=None,
                attention_type="self",
                pg_collection=SimpleNamespace(cp="a group"),
            )
            params = packed_row_params(context_parallel.split(batch, size, rank), size, rank)
            mine = core(*(x[tokens].unsqueeze(1) for x in (q, k, v)), None, packed_seq_params=params).squeeze(1)
            out = out.index_copy(0, tokens, mine)
        assert torch.allclose(out * real, expected * real, atol=1e-6)
        grads = torch.autograd.grad((out * weight * real).sum(), (q, k, v))
        for mine, theirs in zip(grads, expected_grads, strict=True):
            assert torch.allclose(mine, theirs, atol=1e-5)
