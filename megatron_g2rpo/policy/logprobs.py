# SPDX-License-Identifier: Apache-2.0
"""Vocabulary-parallel log-probabilities and entropy, with their exact gradient.

Shape letters: S tokens, V vocabulary, T tensor-parallel ranks; a rank holds the columns ``[rank * P, (rank + 1) * P)``
of the padded vocabulary, P = padded / T.
"""

from __future__ import annotations

from dataclasses import dataclass
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
    if not len(logits):
        empty = logits.new_zeros(0, dtype=torch.float32)
        return empty, empty
    offset = (dist.get_rank(group) if group is not None else 0) * logits.shape[1]
    columns = _Columns(offset=offset, vocab_size=vocab_size, temperature=temperature)
    return _LogprobsAndEntropy.apply(logits, labels, columns, group, chunk_size or len(logits))


@dataclass(frozen=True)
class _Columns:
    """What the columns of this rank's logits are: the first one's vocabulary id, and how logits become scores."""

    offset: int
    vocab_size: int
    temperature: float

    def scaled(self, logits: Tensor) -> Tensor:
        """A float32 copy of the logits over the temperature; padding columns at -inf."""
        scaled = logits.to(torch.float32, copy=True).div_(self.temperature)
        if self.offset + logits.shape[1] > self.vocab_size:
            scaled[:, max(self.vocab_size - self.offset, 0) :] = float("-inf")
        return scaled

    def place(self, labels: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Column of each label (of some label, where it is another rank's), and whether it is this rank's."""
        local = labels - self.offset
        return local.clamp(0, width - 1), (labels != NO_LABEL) & (local >= 0) & (local < width)


class _LogprobsAndEntropy(torch.autograd.Function):
    """Saves the logits in the model's dtype and two numbers a row; probabilities are recomputed chunk by chunk.

    One function for all chunks, so that its gradient is written into one tensor; the gradient of a slice of the logits
    would be as large as the logits, once per chunk.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, logits: Tensor, labels: Tensor, columns: _Columns, group: dist.ProcessGroup | None, chunk_size: int
    ) -> tuple[Tensor, Tensor]:
        parts = [
            _chunk_forward(chunk, chunk_labels, columns, group)
            for chunk, chunk_labels in zip(logits.split(chunk_size), labels.split(chunk_size), strict=True)
        ]
        logprob, entropy, log_normaliser = (torch.cat(part) for part in zip(*parts, strict=True))
        ctx.save_for_backward(logits, labels, log_normaliser, entropy)
        ctx.columns, ctx.chunk_size = columns, chunk_size
        has_label = labels != NO_LABEL
        return torch.where(has_label, logprob, 0.0), torch.where(has_label, entropy, 0.0)

    @staticmethod
    def backward(ctx: Any, grad_logprob: Tensor, grad_entropy: Tensor) -> Any:  # type: ignore[override]
        logits, labels, log_normaliser, entropy = ctx.saved_tensors
        has_label = labels != NO_LABEL
        grad_logprob = torch.where(has_label, grad_logprob, 0.0)
        grad_entropy = torch.where(has_label, grad_entropy, 0.0)
        grad = torch.empty_like(logits)
        for start in range(0, len(logits), ctx.chunk_size):
            rows = slice(start, start + ctx.chunk_size)
            grad[rows] = _chunk_backward(
                logits[rows],
                labels[rows],
                log_normaliser[rows],
                entropy[rows],
                grad_logprob[rows],
                grad_entropy[rows],
                ctx.columns,
            )
        return grad, None, None, None, None


def _chunk_forward(
    logits: Tensor, labels: Tensor, columns: _Columns, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probability (meaningless without a label), entropy and log-normaliser of each row."""
    scaled = columns.scaled(logits)
    peak = scaled.amax(dim=1)
    _all_reduce(peak, dist.ReduceOp.MAX, group)
    shifted = scaled.sub_(peak[:, None])
    index, mine = columns.place(labels, logits.shape[1])
    picked = shifted.gather(1, index[:, None]).squeeze(1)
    weights = shifted.exp()
    # 0 * -inf of a padding column is no contribution.
    weighted = torch.where(weights > 0, weights * shifted, 0.0).sum(dim=1)
    sums = torch.stack([weights.sum(dim=1), weighted, torch.where(mine, picked, 0.0)])
    _all_reduce(sums, dist.ReduceOp.SUM, group)
    log_sum = sums[0].log()
    return sums[2] - log_sum, log_sum - sums[1] / sums[0], peak + log_sum


def _chunk_backward(
    logits: Tensor,
    labels: Tensor,
    log_normaliser: Tensor,
    entropy: Tensor,
    grad_logprob: Tensor,
    grad_entropy: Tensor,
    columns: _Columns,
) -> Tensor:
    """float32 gradient with respect to the unscaled logits; the incoming gradients are 0 on rows without a label."""
    log_p = columns.scaled(logits).sub_(log_normaliser[:, None])
    p = log_p.exp()
    # d logprob = onehot - p;  d entropy = -p (log p + H)
    factor = log_p.masked_fill_(p == 0, 0.0).add_(entropy[:, None]).mul_(-grad_entropy[:, None])
    grad = p.mul_(factor.sub_(grad_logprob[:, None]))
    index, mine = columns.place(labels, logits.shape[1])
    grad.scatter_add_(1, index[:, None], torch.where(mine, grad_logprob, 0.0)[:, None])
    return grad.div_(columns.temperature)


def _all_reduce(tensor: Tensor, op: Any, group: dist.ProcessGroup | None) -> None:
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(tensor, op=op, group=group)
