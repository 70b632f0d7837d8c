# SPDX-License-Identifier: Apache-2.0
"""Vocabulary-parallel log-probabilities and entropy, with their exact gradient.

Shape letters: S tokens, V vocabulary, T tensor-parallel ranks; a rank holds the columns ``[rank * P, (rank + 1) * P)``
of the padded vocabulary, P = padded / T.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_g2rpo.nouns import NO_LABEL


def vocab_parallel_logprobs(
    logits: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each label and entropy of each distribution, both differentiable in the logits.

    With p = softmax(logits / temperature): log p[label] and H = -sum p log p (nats). Gradients with respect to the
    scaled logits: ``onehot(label) - p`` and ``-p * (log p + H)``.

    Args:
        logits: ``[S, P]``, this rank's columns, float32 or bfloat16; the mathematics is float32.
        labels: int64 ``[S]``, global vocabulary ids, or ``NO_LABEL``: both outputs are 0 there and send no gradient.
        vocab_size: V; columns beyond it are padding and take no probability.
        temperature: divides the logits; > 0.
        group: tensor-parallel process group; None when the vocabulary is whole.
        chunk_size: rows that are held in float32 at once; None for all.

    Returns:
        Two float32 ``[S]``, equal on every rank of the group.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    rows = logits.shape[0]
    step = rows if chunk_size is None else chunk_size
    outputs = [
        _LogprobsAndEntropy.apply(
            logits[start : start + step], labels[start : start + step], vocab_size, temperature, group
        )
        for start in range(0, rows, max(step, 1))
    ]
    if not outputs:
        empty = logits.new_zeros(0, dtype=torch.float32)
        return empty, empty
    logprobs, entropies = zip(*outputs, strict=True)
    return torch.cat(logprobs), torch.cat(entropies)


class _LogprobsAndEntropy(torch.autograd.Function):
    """One chunk. Saves the chunk's logits (model dtype) and two numbers a row; probabilities are recomputed."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        temperature: float,
        group: dist.ProcessGroup | None,
    ) -> tuple[Tensor, Tensor]:
        has_label = labels != NO_LABEL
        offset = (dist.get_rank(group) if group is not None else 0) * logits.shape[1]
        scaled = _scaled(logits, vocab_size, temperature, offset)

        peak = scaled.amax(dim=1)
        _all_reduce(peak, dist.ReduceOp.MAX, group)
        shifted = scaled.sub_(peak[:, None])
        local = labels - offset
        mine = has_label & (local >= 0) & (local < logits.shape[1])
        picked = shifted.gather(1, local.clamp(0, logits.shape[1] - 1)[:, None]).squeeze(1)
        weights = shifted.exp()
        # 0 * -inf of a padding column is no contribution.
        weighted = torch.where(weights > 0, weights * shifted, 0.0).sum(dim=1)
        sums = torch.stack([weights.sum(dim=1), weighted, torch.where(mine, picked, 0.0)])
        _all_reduce(sums, dist.ReduceOp.SUM, group)

        log_sum = sums[0].log()
        entropy = log_sum - sums[1] / sums[0]
        logprob = sums[2] - log_sum
        ctx.save_for_backward(logits, labels, peak + log_sum, entropy)
        ctx.parameters = (vocab_size, temperature, offset)
        return torch.where(has_label, logprob, 0.0), torch.where(has_label, entropy, 0.0)

    @staticmethod
    def backward(ctx: Any, grad_logprob: Tensor, grad_entropy: Tensor) -> Any:  # type: ignore[override]
        logits, labels, log_normaliser, entropy = ctx.saved_tensors
        vocab_size, temperature, offset = ctx.parameters
        has_label = labels != NO_LABEL
        grad_logprob = torch.where(has_label, grad_logprob, 0.0)
        grad_entropy = torch.where(has_label, grad_entropy, 0.0)
        log_p = _scaled(logits, vocab_size, temperature, offset).sub_(log_normaliser[:, None])
        p = log_p.exp()
        # d logprob = onehot - p;  d entropy = -p (log p + H)
        factor = log_p.masked_fill_(p == 0, 0.0).add_(entropy[:, None]).mul_(-grad_entropy[:, None])
        grad = p.mul_(factor.sub_(grad_logprob[:, None]))
        local = labels - offset
        mine = has_label & (local >= 0) & (local < logits.shape[1])
        index = local.clamp(0, logits.shape[1] - 1)[:, None]
        grad.scatter_add_(1, index, torch.where(mine, grad_logprob, 0.0)[:, None])
        return (grad / temperature).to(logits.dtype), None, None, None, None


def _scaled(logits: Tensor, vocab_size: int, temperature: float, offset: int) -> Tensor:
    """A float32 copy of the logits over the temperature; padding columns at -inf."""
    scaled = logits.to(torch.float32, copy=True).div_(temperature)
    if offset + logits.shape[1] > vocab_size:
        scaled[:, max(vocab_size - offset, 0) :] = float("-inf")
    return scaled


def _all_reduce(tensor: Tensor, op: Any, group: dist.ProcessGroup | None) -> None:
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(tensor, op=op, group=group)
