# SPDX-License-Identifier: Apache-2.0
"""Log-probability and entropy of each token from its hidden state, vocabulary-parallel, with their exact gradient.

The output projection and the log-probabilities are one autograd function, so that the logits ``[S, V]`` never exist as
a whole: the forward pass goes over chunks of tokens, the backward pass over parts of the vocabulary. The forward pass
leaves its last chunk of logits for the backward pass, which computes the others again.

Shape letters: S tokens, L of them with a label, h hidden size, V vocabulary, T tensor-parallel ranks; a rank holds the
rows ``[rank * P, (rank + 1) * P)`` of the padded output matrix, P = padded / T, of which the first C are vocabulary.

With z = logits / temperature, and for each token y = z - max z, s = sum exp y, p = exp(y) / s, m = sum p y:

    logprob = y[label] - log s               d logprob / d z = onehot(label) - p
    entropy = -sum p log p = log s - m       d entropy / d z = -p (log p + entropy) = -p (y - m)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_g2rpo.policy.layouts.logit_chunks import TILE_BYTES, LogitChunks, slices
from megatron_g2rpo.types import NO_LABEL

# The logit of a banned token: its exponential is 0, and finite, so that 0 times it is 0 as well.
_NEVER = -1e30


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    vocab_size: int,
    temperature: float = 1.0,
    banned_token_ids: Tensor | None = None,
    kept_ids: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """Return each label's log-probability and each distribution's entropy (nats), differentiable in hidden and weight.

    Logits are rounded to the dtype of the model, as its output layer would do; the rest is computed in float32 (float64
    for float64 inputs). Tokens without a label cost nothing.

    Args:
        hidden: ``[S, h]`` hidden states, the same on every rank of the group. Their gradient is this rank's part of a
            sum over the group, which the caller has to take.
        weight: ``[P, h]``, this rank's rows of the output matrix, in the dtype of ``hidden``.
        labels: int64 ``[S]`` global vocabulary ids, the same on every rank of the group; where they are ``NO_LABEL``,
            both outputs are 0 and send no gradient.
        vocab_size: V; rows of the output matrix beyond it are padding and take no probability.
        temperature: number > 0 that divides the logits.
        banned_token_ids: int64 ``[E]``, the same on every rank: ids that the policy never samples. They take no
            probability, and no gradient reaches their rows: the distribution is that of the tokens that can be sampled.
        kept_ids: int64 ``[K, S]``, the same on every rank of the group: for each token with a label the ids that it was
            sampled from, -1 where there are fewer than K. All others take no probability there: the distribution, its
            entropy and the gradients are those of the kept ids. None keeps all.
        group: tensor-parallel process group; None when the vocabulary is whole.
        chunk_size: number of tokens whose float32 logits are held at once. Seven eighths of them are kept from the
            forward to the backward pass, which takes an eighth to compute the others again. None keeps all logits.

    Returns:
        float32 ``[2, S]``, the same on every rank of the group: log-probabilities, entropies.

    Raises:
        ValueError: a label is not in the vocabulary, is banned or is not kept, the ranks hold less than the vocabulary,
            or the temperature or the chunk size is not positive.
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
    banned_token_ids = labels.new_empty(0) if banned_token_ids is None else banned_token_ids.to(labels.device)
    never = labels[labelled][torch.isin(labels[labelled], banned_token_ids)]
    if len(never):
        raise ValueError(f"label {int(never[0])} is one of the tokens that the policy never samples")
    if kept_ids is not None:
        kept_ids = kept_ids[:, labelled]
        left_out = labels[labelled][(kept_ids != labels[labelled]).all(dim=0)]
        if len(left_out):
            raise ValueError(f"label {int(left_out[0])} is not among the tokens that it was sampled from")
    first = rank * held
    width = min(max(vocab_size - first, 0), held)
    share = _Share(
        first=first,
        width=width,
        banned_token_ids=banned_token_ids[(banned_token_ids >= first) & (banned_token_ids < first + width)] - first,
        kept_ids=None if kept_ids is None else kept_ids.t() - first,
        temperature=temperature,
        group=group if ranks > 1 else None,
    )
    return _LinearLogprobs.apply(hidden, weight, labels, labelled, share, LogitChunks.of(len(labelled), chunk_size))


@dataclass(frozen=True)
class _Share:
    """This rank's share of the vocabulary, and what is applied to its logits.

    Attributes:
        first: vocabulary id of this rank's first column of logits.
        width: C, number of this rank's columns without padding; 0 where all are padding.
        banned_token_ids: int64, numbers of this rank's columns that take no probability.
        kept_ids: int64 ``[L, K]``, numbers of the columns that take probability for each token, of which those that are
            not among this rank's columns count for nothing; None where all take some.
        temperature: number that divides the logits.
        group: tensor-parallel process group; None when this rank holds the whole vocabulary.
    """

    first: int
    width: int
    banned_token_ids: Tensor
    kept_ids: Tensor | None
    temperature: float
    group: dist.ProcessGroup | None

    def exclude(self, logits: Tensor, tokens: slice, columns: slice) -> None:
        """Set the logits ``[tokens, columns]`` of what is banned or not kept so that it takes no probability."""
        if len(self.banned_token_ids):
            among = (
                self.banned_token_ids[(self.banned_token_ids >= columns.start) & (self.banned_token_ids < columns.stop)]
                - columns.start
            )
            logits.index_fill_(1, among, _NEVER)
        if self.kept_ids is not None:
            width = _length(columns)
            index = self.kept_ids[tokens] - columns.start
            # What is kept elsewhere is marked in a column behind the last.
            index = torch.where((index >= 0) & (index < width), index, width)
            others = torch.ones(len(index), width + 1, dtype=torch.bool, device=logits.device)
            logits.masked_fill_(others.scatter_(1, index, False)[:, :width], _NEVER)

    def place(self, labels: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
        """Return each label's index in these columns (any index where it is not among them), and whether it is."""
        index = labels - (self.first + columns.start)
        width = columns.stop - columns.start
        return index.clamp(0, max(width - 1, 0)), (index >= 0) & (index < width)


class _LinearLogprobs(torch.autograd.Function):
    """The autograd function of ``linear_logprobs``.

    It saves its inputs, four numbers a token, and the logits of the last chunk.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, labelled: Tensor, share: _Share, chunks: LogitChunks
    ) -> Tensor:
        outputs, statistics, kept = _forward(_take(hidden, labelled), weight, _take(labels, labelled), share, chunks)
        ctx.save_for_backward(hidden, weight, labels, labelled, statistics, kept)
        ctx.share, ctx.chunks = share, chunks
        return outputs.new_zeros(2, len(labels)).index_copy_(1, labelled, outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        hidden, weight, labels, labelled, statistics, kept = ctx.saved_tensors
        grad_tokens, grad_weight = _backward(
            grad[:, labelled],
            _take(hidden, labelled),
            weight,
            _take(labels, labelled),
            statistics,
            kept,
            ctx.share,
            ctx.chunks,
            needs=ctx.needs_input_grad[:2],
        )
        grad_hidden = None
        if grad_tokens is not None:
            grad_hidden = torch.zeros_like(hidden).index_copy_(0, labelled, grad_tokens.to(hidden.dtype))
        return grad_hidden, grad_weight, None, None, None, None


def _forward(
    hidden: Tensor, weight: Tensor, labels: Tensor, share: _Share, chunks: LogitChunks
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the outputs, the statistics and the kept y.

    The outputs ``[2, L]`` are log-probabilities and entropies. The statistics ``[4, L]`` are max z, s, m, and this
    rank's own max z minus max z.
    """
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    # A rank that holds padding only has the lowest maximum and weightless sums.
    peak = hidden.new_full((len(hidden),), torch.finfo(dtype).min, dtype=dtype)
    total, weighted, picked = hidden.new_zeros(3, len(hidden), dtype=dtype)
    index, mine = share.place(labels, slice(0, share.width))
    memory = hidden.new_empty(chunks.forward * share.width, dtype=dtype)
    kept = None
    for chunk in chunks.of_tokens() if share.width else []:
        kept = _product(hidden[chunk], weight[: share.width].t(), out=_view(memory, _length(chunk), share.width))
        share.exclude(kept, chunk, slice(0, share.width))
        for tokens, logits, exp_y in _tiles(kept, chunk.start):
            peak[tokens] = logits.div_(share.temperature).amax(dim=1)
            y = logits.sub_(peak[tokens, None])
            picked[tokens] = y.gather(1, index[tokens, None]).squeeze(1)
            total[tokens] = torch.exp(y, out=exp_y).sum(dim=1)
            weighted[tokens] = exp_y.mul_(y).sum(dim=1)
    # The sums of all chunks are relative to this rank's maxima, so that they need two collectives and not two a chunk.
    highest = _all_reduce(peak.clone(), dist.ReduceOp.MAX, share.group)
    shift = peak - highest
    scale = shift.exp()
    sums = torch.stack([total * scale, (weighted + total * shift) * scale, torch.where(mine, picked + shift, 0.0)])
    total, weighted, picked = _all_reduce(sums, dist.ReduceOp.SUM, share.group)
    log_total, mean = total.log(), weighted / total
    outputs = torch.stack([picked - log_total, log_total - mean])
    return outputs, torch.stack([highest, total, mean, shift]), kept if chunks.kept else None


def _backward(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    statistics: Tensor,
    kept: Tensor | None,
    share: _Share,
    chunks: LogitChunks,
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of hidden ``[L, h]`` and weight ``[P, h]``, None where not needed.

    That of hidden is this rank's part of a sum, in the dtype of ``grad``.
    """
    grad_hidden = torch.zeros_like(hidden, dtype=grad.dtype) if needs[0] else None
    grad_weight = torch.empty_like(weight) if needs[1] else None
    if grad_weight is not None:
        grad_weight[share.width if len(hidden) else 0 :] = 0
    peak, total, mean, shift = statistics
    grad_logprob, grad_entropy = grad / share.temperature
    # d/dz = onehot grad_logprob - p (grad_logprob + grad_entropy (y - m)), with p = exp(y) / s
    slope, intercept = -grad_entropy / total, (grad_entropy * mean - grad_logprob) / total
    # What was kept is y already, relative to this rank's maximum.
    computed = len(hidden) - chunks.kept
    origin = torch.cat([peak[:computed], -shift[computed:]])
    divisor = torch.full_like(origin, share.temperature)
    divisor[computed:] = 1
    parts = chunks.of_vocabulary(share.width)
    memory = grad.new_empty(len(hidden) * max((_length(columns) for columns in parts), default=0))
    for columns in parts:
        logits = _view(memory, len(hidden), _length(columns))
        again = _product(hidden[:computed], weight[columns].t(), out=logits[:computed])
        share.exclude(again, slice(0, computed), columns)
        if kept is not None:
            logits[computed:] = kept[:, columns]
        for tokens, tile, exp_y in _tiles(logits, 0):
            y = tile.div_(divisor[tokens, None]).sub_(origin[tokens, None])
            torch.exp(y, out=exp_y)
            torch.addcmul(intercept[tokens, None], slope[tokens, None], y, out=tile).mul_(exp_y)
        index, mine = share.place(labels, columns)
        logits.scatter_add_(1, index[:, None], torch.where(mine, grad_logprob, 0.0)[:, None])
        grad_logits = logits.to(hidden.dtype)
        if grad_weight is not None:
            torch.mm(grad_logits.t(), hidden, out=grad_weight[columns])
        if grad_hidden is not None:
            _add_product(grad_hidden, grad_logits, weight[columns])
        del grad_logits  # where it is a copy in the model's dtype, the next chunk's logits take its place
    return grad_hidden, grad_weight


def _product(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Compute ``a @ b`` into ``out``, which may have a wider dtype, and return it."""
    return torch.mm(a, b, out=out) if out.dtype == a.dtype else out.copy_(torch.mm(a, b))


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add ``a @ b`` to ``total``, which may have a wider dtype."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    else:
        total.add_(torch.mm(a, b))


def _tiles(logits: Tensor, first: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Iterate over tiles of consecutive rows of the logits matrix.

    Yields for each tile the slice of its rows, counted from ``first``; the rows themselves; and scratch memory of their
    shape.
    """
    height = max(TILE_BYTES // (logits.shape[1] * logits.itemsize), 1)
    memory = torch.empty_like(logits[:height])
    for rows in slices(len(logits), height):
        yield slice(first + rows.start, first + rows.stop), logits[rows], memory[: _length(rows)]


def _view(memory: Tensor, rows: int, columns: int) -> Tensor:
    """Return a matrix in memory that all chunks use in turn: fresh pages cost more than the arithmetic on them."""
    return memory[: rows * columns].view(rows, columns)


def _take(x: Tensor, tokens: Tensor) -> Tensor:
    return x if len(tokens) == len(x) else x[tokens]


def _length(part: slice) -> int:
    return part.stop - part.start


def _all_reduce(tensor: Tensor, op: Any, group: dist.ProcessGroup | None) -> Tensor:
    if group is not None and tensor.numel():
        dist.all_reduce(tensor, op=op, group=group)
    return tensor
