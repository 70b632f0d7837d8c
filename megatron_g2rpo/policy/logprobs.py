# SPDX-License-Identifier: Apache-2.0
"""Log-probability and entropy of each token from its hidden state, vocabulary-parallel, with their exact gradient.

The output projection and the log-probabilities are one autograd function, so that the logits ``[S, V]`` never exist as
a whole: both passes compute them a chunk at a time, the backward pass once more.

Shape letters: S tokens, L of them with a label, h hidden size, V vocabulary, T tensor-parallel ranks; a rank holds the
rows ``[rank * P, (rank + 1) * P)`` of the padded output matrix, P = padded / T, of which the first C are vocabulary.

With z = logits / temperature, and for each token y = z - max z, s = sum exp y, p = exp(y) / s, m = sum p y:

    logprob = y[label] - log s               d logprob / d z = onehot(label) - p
    entropy = -sum p log p = log s - m       d entropy / d z = -p (log p + entropy) = -p (y - m)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_g2rpo.nouns import NO_LABEL


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    group: dist.ProcessGroup | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Log-probability of each label and entropy of each distribution (nats), differentiable in hidden and weight.

    Logits are rounded to the dtype of the model, as its output layer would; the rest is float32 (float64 for float64
    inputs). Tokens without a label cost nothing.

    Args:
        hidden: ``[S, h]``, the same on every rank of the group. Its gradient is this rank's part of a sum over the
            group; the sum is the caller's to take.
        weight: ``[P, h]``, this rank's rows of the output matrix, in the dtype of ``hidden``.
        labels: int64 ``[S]``, the same on every rank of the group: global vocabulary ids, or ``NO_LABEL``: both outputs
            are 0 there and send no gradient.
        vocab_size: V; rows of the matrix beyond it are padding and take no probability.
        temperature: divides the logits; > 0.
        group: tensor-parallel process group; None when the vocabulary is whole.
        chunk_size: tokens whose logits are held at once; None for all. The backward pass holds as many logits, but of
            all tokens and a part of the vocabulary: the gradient of that part of the matrix is then a single product,
            rounded once.

    Returns:
        float32 ``[2, S]``, the same on every rank of the group: log-probabilities, entropies.

    Raises:
        ValueError: a label is not in the vocabulary, the ranks hold less than the vocabulary, or the temperature or the
            chunk size is not positive.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be > 0, got {temperature}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    rank, ranks = (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)
    held = weight.shape[0]
    if held * ranks < vocab_size:
        raise ValueError(f"{ranks} ranks with {held} rows of the output matrix are less than {vocab_size} tokens")
    labelled = (labels != NO_LABEL).nonzero().squeeze(1)
    wrong = labels[labelled][(labels[labelled] < 0) | (labels[labelled] >= vocab_size)]
    if len(wrong):
        raise ValueError(f"label {int(wrong[0])} is not in a vocabulary of {vocab_size}")
    first = rank * held
    share = _Share(
        first=first,
        width=min(max(vocab_size - first, 0), held),
        temperature=temperature,
        chunk_size=min(chunk_size or len(labelled), len(labelled)),
        group=group if ranks > 1 else None,
    )
    return _LinearLogprobs.apply(hidden, weight, labels, labelled, share)


@dataclass(frozen=True)
class _Share:
    """This rank's share of the vocabulary, and how it is gone through.

    Attributes:
        first: vocabulary id of its first column of logits.
        width: C, its columns without padding; 0 where all are padding.
        temperature: divides the logits.
        chunk_size: tokens whose logits are held at once; no more than there are, 0 if there are none.
        group: the ranks that hold the others; None without others.
    """

    first: int
    width: int
    temperature: float
    chunk_size: int
    group: dist.ProcessGroup | None

    def token_chunks(self, tokens: int) -> list[slice]:
        return _slices(tokens, self.chunk_size) if self.width else []

    def vocabulary_chunks(self, tokens: int) -> list[slice]:
        """Parts of the columns whose logits, over all tokens, are no more than those of a chunk of tokens."""
        return _slices(self.width, max(self.chunk_size * self.width // tokens, 1)) if tokens else []

    def scaled_logits(self, hidden: Tensor, weight: Tensor, out: Tensor) -> Tensor:
        """``hidden @ weight.T / temperature`` in ``out``."""
        if out.dtype == hidden.dtype:
            torch.mm(hidden, weight.t(), out=out)
        else:
            out.copy_(torch.mm(hidden, weight.t()))
        return out if self.temperature == 1 else out.div_(self.temperature)

    def place(self, labels: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
        """Index of each label in these columns (of any, where it is not among them), and whether it is."""
        index = labels - (self.first + columns.start)
        width = columns.stop - columns.start
        return index.clamp(0, max(width - 1, 0)), (index >= 0) & (index < width)


class _LinearLogprobs(torch.autograd.Function):
    """Saves the inputs and three numbers a token; the backward pass computes the logits again."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, labelled: Tensor, share: _Share
    ) -> Tensor:
        outputs, statistics = _forward(_take(hidden, labelled), weight, _take(labels, labelled), share)
        ctx.save_for_backward(hidden, weight, labels, labelled, statistics)
        ctx.share = share
        return outputs.new_zeros(2, len(labels)).index_copy_(1, labelled, outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        hidden, weight, labels, labelled, statistics = ctx.saved_tensors
        grad_tokens, grad_weight = _backward(
            grad[:, labelled],
            _take(hidden, labelled),
            weight,
            _take(labels, labelled),
            statistics,
            ctx.share,
            needs=ctx.needs_input_grad[:2],
        )
        grad_hidden = None
        if grad_tokens is not None:
            grad_hidden = torch.zeros_like(hidden).index_copy_(0, labelled, grad_tokens.to(hidden.dtype))
        return grad_hidden, grad_weight, None, None, None


def _forward(hidden: Tensor, weight: Tensor, labels: Tensor, share: _Share) -> tuple[Tensor, Tensor]:
    """``[2, L]`` log-probabilities and entropies; ``[3, L]`` max z, s and m."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    # A rank that holds padding only has the lowest maximum and weightless sums.
    peak = hidden.new_full((len(hidden),), torch.finfo(dtype).min, dtype=dtype)
    total, weighted, picked = hidden.new_zeros(3, len(hidden), dtype=dtype)
    index, mine = share.place(labels, slice(0, share.width))
    scratch = _Scratch(hidden, dtype)
    for tokens in share.token_chunks(len(hidden)):
        shape = (tokens.stop - tokens.start, share.width)
        z = share.scaled_logits(hidden[tokens], weight[: share.width], out=scratch[0, shape])
        peak[tokens] = z.amax(dim=1)
        y = z.sub_(peak[tokens, None])
        picked[tokens] = y.gather(1, index[tokens, None]).squeeze(1)
        weights = torch.exp(y, out=scratch[1, shape])
        total[tokens] = weights.sum(dim=1)
        weighted[tokens] = weights.mul_(y).sum(dim=1)
    # The sums of all chunks are relative to this rank's maxima, so that they need two collectives and not two a chunk.
    highest = _all_reduce(peak.clone(), dist.ReduceOp.MAX, share.group)
    shift = peak - highest
    scale = shift.exp()
    sums = torch.stack([total * scale, (weighted + total * shift) * scale, torch.where(mine, picked + shift, 0.0)])
    total, weighted, picked = _all_reduce(sums, dist.ReduceOp.SUM, share.group)
    log_total, mean = total.log(), weighted / total
    return torch.stack([picked - log_total, log_total - mean]), torch.stack([highest, total, mean])


def _backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    statistics: Tensor,
    share: _Share,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of hidden ``[L, h]`` (this rank's part, in the dtype of ``grad``) and weight ``[P, h]``, if needed."""
    grad_hidden = torch.zeros_like(hidden, dtype=grad.dtype) if needs[0] else None
    grad_weight = torch.empty_like(weight) if needs[1] else None
    if grad_weight is not None:
        grad_weight[share.width if len(hidden) else 0 :] = 0
    peak, total, mean = statistics
    grad_logprob, grad_entropy = grad / share.temperature
    # d/dz = onehot grad_logprob - p (grad_logprob + grad_entropy (y - m)), with p = exp(y) / s
    slope, intercept = -grad_entropy / total, (grad_entropy * mean - grad_logprob) / total
    scratch = _Scratch(hidden, grad.dtype)
    for columns in share.vocabulary_chunks(len(hidden)):
        shape = (len(hidden), columns.stop - columns.start)
        y = share.scaled_logits(hidden, weight[columns], out=scratch[0, shape]).sub_(peak[:, None])
        exp_y = torch.exp(y, out=scratch[1, shape])
        grad_logits = torch.addcmul(intercept[:, None], slope[:, None], y, out=y).mul_(exp_y)
        index, mine = share.place(labels, columns)
        grad_logits.scatter_add_(1, index[:, None], torch.where(mine, grad_logprob, 0.0)[:, None])
        grad_logits = grad_logits.to(hidden.dtype)
        if grad_weight is not None:
            torch.mm(grad_logits.t(), hidden, out=grad_weight[columns])
        if grad_hidden is not None:
            _add_product(grad_hidden, grad_logits, weight[columns])
        del grad_logits  # where it is a copy in the model's dtype, the next chunk's logits take its place
    return grad_hidden, grad_weight


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """``total += a @ b``; total may be of a wider dtype."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total.add_(torch.mm(a, b))


class _Scratch:
    """Memory that all chunks of a pass share: fresh pages for each would cost more than the arithmetic on them."""

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        self._like, self._dtype = like, dtype
        self._memory: dict[int, Tensor] = {}

    def __getitem__(self, key: tuple[int, tuple[int, int]]) -> Tensor:
        """Tensor number ``key[0]``, contiguous, of shape ``key[1]``; the first chunk is the largest."""
        number, (rows, columns) = key
        if number not in self._memory:
            self._memory[number] = self._like.new_empty(rows * columns, dtype=self._dtype)
        return self._memory[number][: rows * columns].view(rows, columns)


def _take(x: Tensor, tokens: Tensor) -> Tensor:
    return x if len(tokens) == len(x) else x[tokens]


def _slices(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, max(step, 1))]


def _all_reduce(tensor: Tensor, op: Any, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None and tensor.numel():
        dist.all_reduce(tensor, op=op, group=group)
    return tensor
