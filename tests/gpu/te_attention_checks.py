# SPDX-License-Identifier: Apache-2.0
"""Checks of Transformer Engine's attention and of what surrounds it, against plain torch in fp32.

Each raises AssertionError where they differ. They hold on a GPU as well as on the emulation; the tolerances, parts of
the largest expected value, are those of bf16 operands and outputs (2^-8, and sums of them in gradients) unless said.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from tests.gpu.devices import VIRTUAL
from tests.gpu.te_checks import assert_near

LENGTHS, PADDED = (48, 80, 33), (48, 96, 48)
HEADS, GROUPS, WIDTH = 8, 2, 32
# fp32 goes through torch's own products: sums in another order. A GPU's TF32 has 10 bits of mantissa.
TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-5 if VIRTUAL else 2e-3}


def plain(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool = True, scale: float | None = None
) -> torch.Tensor:
    """Return the attention of one sequence, fp32 [queries, heads, d], from q and from k and v [keys, groups, d]."""
    group = q.shape[1] // k.shape[1]
    keys, values = (each.float().repeat_interleave(group, 1) for each in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.float(), keys) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        after = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(after, float("-inf"))
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)


def offsets(lengths: Sequence[int], device: Any = "cuda") -> torch.Tensor:
    """Return cumulated lengths, int32 [sequences + 1]."""
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32, device=device)


def plain_packed(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: Sequence[int], padded: Sequence[int], **options: Any
) -> torch.Tensor:
    """Return the attention of packed sequences, [tokens, heads, d]; padding tokens give 0."""
    parts, at = [], 0
    for length, whole in zip(lengths, padded, strict=True):
        token = slice(at, at + length)
        parts += [plain(q[token], k[token], v[token], **options), q.new_zeros(whole - length, *q.shape[1:]).float()]
        at += whole
    return torch.cat(parts)


def attention(**options: Any) -> Any:
    """Return te.DotProductAttention of the heads and groups above."""
    import transformer_engine.pytorch as te

    return te.DotProductAttention(
        options.pop("heads", HEADS), WIDTH, num_gqa_groups=GROUPS, attention_dropout=0.0, **options
    )


def selected() -> str:
    """Return which backend the last call of an attention took."""
    from transformer_engine.pytorch.attention.dot_product_attention import dot_product_attention

    chosen = dot_product_attention._attention_backends
    names = {"use_flash_attention": "flash", "use_fused_attention": "fused", "use_unfused_attention": "unfused"}
    return next((name for key, name in names.items() if chosen[key]), "none")


def random(*shape: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Return normal numbers on the device, the same for one seed."""
    drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return drawn.to(dtype).cuda().requires_grad_()


def check_packed(dtype: torch.dtype, *, padded: bool, scale: float | None = None) -> None:
    """Packed causal sequences with grouped queries: output and gradients, with or without padding between sequences."""
    whole = PADDED if padded else LENGTHS
    tokens = sum(whole)
    q, k, v = (random(tokens, n, WIDTH, dtype=dtype, seed=i) for i, n in enumerate((HEADS, GROUPS, GROUPS)))
    layer = attention(qkv_format="thd", attn_mask_type="padding_causal", softmax_scale=scale)
    cu = {f"cu_seqlens_{side}": offsets(LENGTHS) for side in ("q", "kv")}
    if padded:
        cu |= {f"cu_seqlens_{side}_padded": offsets(whole) for side in ("q", "kv")}
    y = layer(q, k, v, **cu, max_seqlen_q=max(whole), max_seqlen_kv=max(whole))
    qs, ks, vs = (each.detach().float().requires_grad_() for each in (q, k, v))
    expected = plain_packed(qs, ks, vs, LENGTHS, whole, scale=scale)
    dy = random(tokens, HEADS, WIDTH, dtype=dtype, seed=7).detach()
    y.backward(dy.view(y.shape))
    expected.backward(dy.float())
    of_tokens = expected.detach().abs().sum((1, 2)) > 0  # what padding tokens give is of no use to anyone
    assert_near(
        [y.view(expected.shape)[of_tokens], q.grad[of_tokens], k.grad[of_tokens], v.grad[of_tokens]],
        [expected[of_tokens], qs.grad[of_tokens], ks.grad[of_tokens], vs.grad[of_tokens]],
        TOLERANCE[dtype],
        ("y", "dq", "dk", "dv"),
    )


def check_batch(dtype: torch.dtype, mask: str, qkv_format: str = "sbhd") -> None:
    """A batch of full sequences, [s, b, h, d] or [b, s, h, d]."""
    length, batch = 64, 2
    first = (length, batch) if qkv_format == "sbhd" else (batch, length)
    q, k, v = (random(*first, n, WIDTH, dtype=dtype, seed=i) for i, n in enumerate((HEADS, GROUPS, GROUPS)))
    layer = attention(qkv_format=qkv_format, attn_mask_type=mask)
    y = layer(q, k, v)
    qs, ks, vs = (each.detach().float().requires_grad_() for each in (q, k, v))
    axis = 1 if qkv_format == "sbhd" else 0
    rows = zip(*(each.unbind(axis) for each in (qs, ks, vs)), strict=True)
    expected = torch.stack([plain(*row, causal=mask == "causal") for row in rows], axis)
    dy = random(*first, HEADS, WIDTH, dtype=dtype, seed=7).detach()
    y.backward(dy.view(y.shape))
    expected.backward(dy.float())
    actual, names = [y, q.grad, k.grad, v.grad], ("y", "dq", "dk", "dv")
    assert_near(actual, [expected, qs.grad, ks.grad, vs.grad], TOLERANCE[dtype], names)


def check_dropout() -> None:
    """Dropout follows the device's generator, and the backward pass drops what the forward pass dropped.

    For one mask the output is linear in v, so ``<dy, y> = <dv, v>``. Both sums are of bf16 products: 1e-2 of the norm.
    """
    import transformer_engine.pytorch as te

    layer = te.DotProductAttention(4, WIDTH, attention_dropout=0.3, qkv_format="bshd", attn_mask_type="causal")
    q, k, v = (random(2, 64, 4, WIDTH, dtype=torch.bfloat16, seed=i) for i in range(3))
    outputs = []
    for seed in (1, 1, 2):
        torch.cuda.manual_seed(seed)
        outputs.append(layer(q, k, v))
    assert torch.equal(outputs[0], outputs[1]), "one seed gave two masks"
    assert not torch.equal(outputs[0], outputs[2]), "two seeds gave one mask"
    dy = random(2, 64, 4 * WIDTH, dtype=torch.bfloat16, seed=7).detach()
    dv = torch.autograd.grad(outputs[0], v, dy.view(outputs[0].shape))[0]
    forward = float((dy.float().view(-1) * outputs[0].detach().float().view(-1)).sum())
    backward = float((dv.float() * v.detach().float()).sum())
    scale = float(dy.float().norm() * outputs[0].detach().float().norm())
    assert abs(forward - backward) <= 1e-2 * scale, f"<dy, y> = {forward}, <dv, v> = {backward}"


def check_rotation(dtype: torch.dtype) -> None:
    """The fused rotation is megatron-core's unfused one: per-token angles, a part of the width, interleaved or not.

    fp32: sines and cosines of one library, 1e-6. bf16: the unfused one rounds them and each product to bf16 (2^-8).
    """
    from megatron.core.extensions.transformer_engine import fused_apply_rotary_pos_emb
    from megatron.core.models.common.embeddings import rope_utils

    for rotated, interleaved in ((WIDTH, False), (WIDTH // 2, False), (WIDTH, True)):
        half = random(24, 1, 1, rotated // 2, dtype=torch.float32, seed=3).detach() * 30
        angles = half.repeat_interleave(2, -1) if interleaved else torch.cat([half, half], -1)
        x, z = (random(24, 2, 4, WIDTH, dtype=dtype, seed=1) for _ in range(2))
        y = fused_apply_rotary_pos_emb(x, angles, interleaved=interleaved)
        expected = rope_utils._apply_rotary_pos_emb_bshd(z, angles, rotary_interleaved=interleaved)
        _compare_rotations(x, z, y, expected)


def check_packed_rotation(dtype: torch.dtype) -> None:
    """The same for packed sequences, of one rank and of each of two context-parallel ranks."""
    from megatron.core.extensions.transformer_engine import fused_apply_rotary_pos_emb_thd
    from megatron.core.models.common.embeddings import rope_utils

    half = random(32, 1, 1, WIDTH // 2, dtype=torch.float32, seed=3).detach() * 30
    angles = torch.cat([half, half], -1)
    cu_seqlens = offsets((8, 32, 12))
    for size, rank in ((1, 0), (2, 0), (2, 1)):
        group: Any = SimpleNamespace(size=lambda size=size: size, rank=lambda rank=rank: rank)
        x, z = (random(52 // size, 4, WIDTH, dtype=dtype, seed=1) for _ in range(2))
        y = fused_apply_rotary_pos_emb_thd(x, cu_seqlens, angles, cp_size=size, cp_rank=rank)
        expected = rope_utils._apply_rotary_pos_emb_thd(z, cu_seqlens, angles, cp_group=group)
        _compare_rotations(x, z, y, expected)


def _compare_rotations(x: torch.Tensor, z: torch.Tensor, y: torch.Tensor, expected: torch.Tensor) -> None:
    dy = random(*y.shape, dtype=y.dtype, seed=5).detach()
    (dx,), (dz,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(expected, z, dy)
    tolerance = {torch.float32: 1e-6 if VIRTUAL else 1e-5, torch.bfloat16: 1e-2}[y.dtype]
    assert_near([y, dx], [expected, dz], tolerance, ("y", "dx"))


def check_merging() -> None:
    """Attention over two parts of the keys, merged by the helpers of context parallelism, is that over all keys.

    In the second part either all queries take part, or those of second halves; log-sum-exps are packed or not. All is
    in fp32: 1e-5.
    """
    import transformer_engine.pytorch  # noqa: F401  (it loads the extension)
    import transformer_engine_torch as tex

    lengths = (8, 12)
    cu_seqlens, tokens, heads = offsets(lengths), sum(lengths), 2
    q, k, v = (random(2 * tokens, heads, 16, dtype=torch.float32, seed=i).detach() for i in range(3))
    q = q[:tokens]
    for second in (False, True):
        of = (torch.cat(_second_halves(lengths)) if second else torch.arange(tokens)).cuda()
        old, old_lse = _attend(q, k[:tokens], v[:tokens])
        part, part_lse = _attend(q[of], k[tokens:], v[tokens:])
        expected = old.clone()
        expected[of] = _attend(q[of], k, v)[0]
        for packed in (True, False):
            whole, step = old_lse, part_lse
            if not packed:
                whole = _unpacked(old_lse, lengths)
                step = _unpacked(part_lse, [length // 2 if second else length for length in lengths])
            merged = whole.clone()
            if second:
                tex.thd_second_half_lse_correction(merged, step, cu_seqlens, packed)
            else:
                merged = torch.logaddexp(whole, step)
            out = old.clone()
            tex.thd_out_correction(out, part, whole, merged, step, cu_seqlens, second, packed)
            assert_near([out], [expected], 1e-5, [f"second half {second}, packed {packed}"])
            if second:
                read = tex.thd_read_second_half_lse(whole, cu_seqlens, packed, step.shape[-1])
                own = old_lse[:, of]
                wanted = own if packed else _unpacked(own, [length // 2 for length in lengths])
                assert torch.equal(read.nan_to_num(), wanted.nan_to_num())


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return output [queries, heads, d] and log-sum-exp [heads, queries] of attention to every key."""
    scores = torch.einsum("qhd,khd->hqk", q, k) / 4
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v), scores.logsumexp(-1)


def _second_halves(lengths: Sequence[int]) -> list[torch.Tensor]:
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return [torch.arange(end - length // 2, end) for end, length in zip(ends, lengths, strict=True)]


def _unpacked(lse: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """Return [heads, tokens] as [sequences, heads, longest], 0 beyond a sequence's end."""
    rows = [torch.nn.functional.pad(part, (0, max(lengths) - part.shape[1])) for part in lse.split(list(lengths), 1)]
    return torch.stack(rows)
