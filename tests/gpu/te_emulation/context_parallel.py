# SPDX-License-Identifier: Apache-2.0
"""Packed rows ("thd") over context-parallel ranks: the partition of tokens, halves of sequences, merging of parts.

Rank r of cp holds chunks r and 2 * cp - 1 - r of every sequence, cut into 2 * cp, first the one, then the other: its
first and second half. ``cu_seqlens`` [sequences + 1] are those of this rank's tokens, padding included, so every length
is even. Log-sum-exps (LSE) are fp32 [heads, tokens] where packed, else [sequences, heads, longest sequence].
"""

from __future__ import annotations

from itertools import pairwise

import torch


def thd_get_partitioned_indices(
    cu_seqlens: torch.Tensor, total_tokens: int, world_size: int, rank: int
) -> torch.Tensor:
    """Return which tokens of the whole row a rank holds, int32 [total_tokens / world_size].

    Raises:
        RuntimeError: A sequence's length is no multiple of 2 * world_size.
    """
    parts = []
    for start, end in _bounds(cu_seqlens):
        if (end - start) % (2 * world_size):
            raise RuntimeError(f"a sequence of {end - start} tokens is not divisible by 2 * {world_size}")
        size = (end - start) // (2 * world_size)
        for chunk in (rank, 2 * world_size - 1 - rank):
            parts.append(torch.arange(start + chunk * size, start + (chunk + 1) * size))
    return torch.cat(parts)[: total_tokens // world_size].to(torch.int32).to(cu_seqlens.device)


def thd_sequence_order_to_cp_rank_order(
    inp: torch.Tensor, cu_seqlens: torch.Tensor, cp_size: int, total_tokens: int
) -> torch.Tensor:
    """Return a whole row [tokens, ..] as the ranks' parts, one after the other."""
    return inp[_rank_order(cu_seqlens, cp_size, total_tokens)]


def thd_cp_rank_order_to_sequence_order(
    inp: torch.Tensor, cu_seqlens: torch.Tensor, cp_size: int, total_tokens: int
) -> torch.Tensor:
    """Return the ranks' parts, one after the other, as the whole row [tokens, ..]."""
    out = torch.empty_like(inp)
    out[_rank_order(cu_seqlens, cp_size, total_tokens)] = inp
    return out


@torch.no_grad()
def thd_copy_valid_tokens_from_per_split_to_rank_local(
    out: torch.Tensor, inp: torch.Tensor, cu_seqlens_padded: torch.Tensor, cu_seqlens: torch.Tensor
) -> None:
    """Copy the tokens of each sequence, without its padding, from ``inp`` to the same place of ``out`` [tokens, ..]."""
    for (start, end), (first, last) in zip(_bounds(cu_seqlens_padded), _bounds(cu_seqlens), strict=True):
        valid = slice(start, start + min(last - first, end - start))
        out[valid] = inp[valid]


def thd_read_half_tensor(tensor: torch.Tensor, cu_seqlens: torch.Tensor, half_idx: int) -> torch.Tensor:
    """Return the first (0) or second (1) half of each sequence of [tokens, heads, d] or of k and v, [2, tokens, ..]."""
    return tensor.index_select(_token_axis(tensor), _half(cu_seqlens, second=half_idx == 1))


@torch.no_grad()
def thd_read_second_half_lse(
    lse: torch.Tensor, cu_seqlens: torch.Tensor, lse_packed: bool, second_half_lse_seqlen: int
) -> torch.Tensor:
    """Return the LSE of the second halves, [heads, second_half_lse_seqlen] or [sequences, heads, ..]; the rest is 0."""
    out = lse.new_zeros(*lse.shape[:-1], second_half_lse_seqlen)
    if lse_packed:
        tokens = _half(cu_seqlens, second=True)
        out[:, : tokens.numel()] = lse[:, tokens]
        return out
    for i, (start, end) in enumerate(_bounds(cu_seqlens)):
        half = (end - start) // 2
        out[i, :, :half] = lse[i, :, half : 2 * half]
    return out


@torch.no_grad()
def thd_second_half_lse_correction(
    lse: torch.Tensor, lse_per_step: torch.Tensor, cu_seqlens: torch.Tensor, lse_packed: bool
) -> None:
    """Merge the LSE of a step, which only has second halves, into that of whole sequences, in place."""
    if lse_packed:
        tokens = _half(cu_seqlens, second=True)
        lse[:, tokens] = _merged(lse[:, tokens], lse_per_step[:, : tokens.numel()])
        return
    for i, (start, end) in enumerate(_bounds(cu_seqlens)):
        half = (end - start) // 2
        lse[i, :, half : 2 * half] = _merged(lse[i, :, half : 2 * half], lse_per_step[i, :, :half])


@torch.no_grad()
def thd_out_correction(
    out: torch.Tensor,
    out_per_step: torch.Tensor,
    old_lse: torch.Tensor,
    lse: torch.Tensor,
    lse_per_step: torch.Tensor,
    cu_seqlens: torch.Tensor,
    only_second_half: bool,
    lse_packed: bool,
) -> None:
    """Merge the output of a step into ``out`` [tokens, heads, d], in place, as the online softmax does.

    ``out = out * exp(old_lse - lse) + out_per_step * exp(lse_per_step - lse)``, where ``lse`` already has the step in
    it. A value of 0 stays 0 whatever its LSE is: padding tokens have none.
    """
    tokens = _half(cu_seqlens, second=True) if only_second_half else _all(cu_seqlens)

    def of_whole(statistics: torch.Tensor) -> torch.Tensor:
        return _per_token(statistics, cu_seqlens, tokens, lse_packed, second=only_second_half, whole=True)

    def weighted(values: torch.Tensor, difference: torch.Tensor) -> torch.Tensor:
        return torch.where(values == 0, values, values * difference.exp().t()[..., None])

    new = of_whole(lse)
    step = _per_token(lse_per_step, cu_seqlens, tokens, lse_packed, second=only_second_half, whole=False)
    merged = weighted(out[tokens].float(), of_whole(old_lse) - new)
    merged = merged + weighted(out_per_step[: tokens.numel()].float(), step - new)
    out[tokens] = merged.to(out.dtype)


@torch.no_grad()
def thd_grad_correction(
    grad: torch.Tensor, grad_per_step: torch.Tensor, cu_seqlens: torch.Tensor, first_half: str, second_half: str
) -> None:
    """Bring the gradient of a step into ``grad`` [tokens, ..] or [2, tokens, ..], in place, half by half.

    Each half is one of "add", "copy", "zero" and "none". ``grad_per_step`` has both halves where both are read, else
    only the one that is.

    Raises:
        RuntimeError: A pair that the extension does not have, or bytes of FP8 that would be added.
    """
    pair = {first_half, second_half}
    if pair not in ({"add", "none"}, {"copy", "none"}, {"add", "copy"}, {"copy", "zero"}):
        raise RuntimeError(f"Unsupported Functor of first half ({first_half}) and second_half ({second_half})")
    if grad.dtype == torch.uint8 and "add" in pair:
        raise RuntimeError("gradients in FP8 cannot be added as bytes")
    axis = _token_axis(grad)
    for how, second in ((first_half, False), (second_half, True)):
        tokens = _half(cu_seqlens, second=second)
        if how == "zero":
            grad.index_fill_(axis, tokens, 0)
        elif how != "none":
            both = pair == {"add", "copy"}
            new = grad_per_step.index_select(axis, tokens) if both else grad_per_step.narrow(axis, 0, tokens.numel())
            grad.index_copy_(axis, tokens, grad.index_select(axis, tokens) + new if how == "add" else new)


def _bounds(cu_seqlens: torch.Tensor) -> list[tuple[int, int]]:
    offsets = cu_seqlens.tolist()
    return list(pairwise(offsets))


def _rank_order(cu_seqlens: torch.Tensor, cp_size: int, total: int) -> torch.Tensor:
    return torch.cat([thd_get_partitioned_indices(cu_seqlens, total, cp_size, rank) for rank in range(cp_size)]).long()


def _token_axis(tensor: torch.Tensor) -> int:
    return 0 if tensor.dim() == 3 else 1


def _all(cu_seqlens: torch.Tensor) -> torch.Tensor:
    return torch.arange(int(cu_seqlens[-1]), device=cu_seqlens.device)


def _half(cu_seqlens: torch.Tensor, *, second: bool) -> torch.Tensor:
    """Return the numbers of the tokens of the first or second halves, in order."""
    parts = []
    for start, end in _bounds(cu_seqlens):
        middle = (start + end) // 2
        parts.append(torch.arange(middle, end) if second else torch.arange(start, middle))
    return torch.cat(parts).to(cu_seqlens.device)


def _merged(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return log(exp(a) + exp(b))."""
    high, low = torch.maximum(a, b), torch.minimum(a, b)
    return high + torch.log1p(torch.exp(low - high))


def _per_token(
    lse: torch.Tensor, cu_seqlens: torch.Tensor, tokens: torch.Tensor, packed: bool, *, second: bool, whole: bool
) -> torch.Tensor:
    """Return LSE as [heads, tokens] of all tokens or second halves; ``whole``: ``lse`` is of whole sequences."""
    if packed:
        return lse[:, tokens] if whole else lse[:, : tokens.numel()]
    parts = []
    for i, (start, end) in enumerate(_bounds(cu_seqlens)):
        length = (end - start) // 2 if second else end - start
        at = length if second and whole else 0
        parts.append(lse[i, :, at : at + length])
    return torch.cat(parts, -1)
