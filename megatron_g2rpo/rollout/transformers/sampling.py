# SPDX-License-Identifier: Apache-2.0
"""Reproducible sampling: the tokens of a response depend on its own name, never on the other sequences of its batch.

Every (seed, prompt, sample, position) owns one uniform number, a pure function of those four (counter-based, so no
generator state exists that batching could disturb). A token is drawn by inverting the cumulative distribution at that
number in float64. Two batch compositions then differ only where float noise of the logits moves a boundary of the
distribution across the number: about once in a million tokens in fp32.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megatron_g2rpo.rollout.base import Sampling


def uniforms(seed: int, key: str, sample_index: int, count: int) -> Tensor:
    """Return the uniform numbers of one response: float64 ``[count]`` in [0, 1), multiples of 2**-53.

    They come from the SHAKE-256 stream of the response's name (seed, prompt and sample), so they are the same on every
    machine, and a larger ``count`` only appends numbers.

    Args:
        seed: seed of the step.
        key: key of the prompt.
        sample_index: index of the response in its group.
        count: how many numbers to return, one for each response token.
    """
    name = f"{seed}/{sample_index}/{key}".encode()
    stream = hashlib.shake_256(name).digest(8 * count)
    words = torch.frombuffer(bytearray(stream), dtype=torch.int64)
    return ((words >> 11) & (2**53 - 1)).double() * 2.0**-53


class Draw(NamedTuple):
    """One drawn token for each of ``B`` sequences.

    Attributes:
        tokens: int64 ``[B]``.
        logprobs: float64 ``[B]``, their log-probabilities under the distribution that they were drawn from
            (at temperature 1 when greedy).
        kept: int64 ``[B, K]``, the tokens that each was drawn from, -1 where there are fewer than K; None where nobody
            asked.
    """

    tokens: Tensor
    logprobs: Tensor
    kept: Tensor | None


class Drawing:
    """Draws tokens of one vocabulary.

    Args:
        banned: ascending ids of the tokens that are never drawn.
        vocab: number of tokens.
        device: device of the logits.
    """

    def __init__(self, banned: Sequence[int], vocab: int, device: torch.device | str = "cpu") -> None:
        self._banned = torch.tensor(banned, dtype=torch.int64, device=device)
        if len(banned) == vocab:
            raise ValueError(f"all {vocab} tokens are banned")

    def __call__(self, logits: Tensor, uniform: Tensor | None, sampling: Sampling) -> Draw:
        """Draw one token per sequence from ``softmax(logits / temperature)`` over what is not banned and not filtered.

        Args:
            logits: ``[B, V]``, finite.
            uniform: float64 ``[B]`` in [0, 1); None takes the most likely token (greedy).
            sampling: temperature, above 0, and filters; not used when greedy.
        """
        scores = logits.to(torch.float64, copy=True).index_fill_(1, self._banned, -math.inf)
        if uniform is not None:
            if sampling.temperature != 1.0:
                scores.div_(sampling.temperature)
            scores = filtered(scores, sampling)
        top = scores.amax(-1, keepdim=True)
        cumulative = (scores - top).exp_().cumsum_(-1)
        total = cumulative[:, -1]
        if uniform is None:
            index = scores.argmax(-1)
        else:
            # Strictly below the total, so that an entry above it exists, and the first such entry has positive mass.
            target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
            index = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
        logprobs = scores.gather(1, index[:, None])[:, 0] - top[:, 0] - total.log()
        return Draw(index, logprobs, _kept(scores) if sampling.return_kept else None)


def _kept(scores: Tensor) -> Tensor:
    """Return the tokens whose scores ``[B, V]`` are finite: int64 ``[B, K]``, -1 where there are fewer."""
    most = int(scores.isfinite().sum(-1).max())
    likeliest = scores.topk(most, dim=-1)
    return likeliest.indices.masked_fill(likeliest.values.isinf(), -1)


def filtered(scores: Tensor, sampling: Sampling) -> Tensor:
    """Return the scores with minus infinity at the tokens that the filters leave out.

    The filters follow one another as in vLLM's sampler (``vllm/v1/sample/sampler.py``): ``min_p``, then ``top_k``, then
    ``top_p`` of the probability that is left. The most likely token always stays.

    Args:
        scores: float64 ``[B, A]``, logits divided by the temperature.
        sampling: the filters; those that are None change nothing.
    """
    if sampling.min_p is not None:
        least = scores.amax(-1, keepdim=True) + math.log(sampling.min_p)
        scores = scores.masked_fill(scores < least, -math.inf)
    if sampling.top_k is not None and sampling.top_k < scores.shape[1]:
        last = scores.topk(sampling.top_k, dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < last, -math.inf)
    if sampling.top_p is not None and sampling.top_p < 1.0:
        ascending, places = scores.sort(dim=-1)
        left_out = ascending.softmax(-1).cumsum(-1) <= 1.0 - sampling.top_p
        left_out[:, -1] = False
        scores = scores.masked_fill(torch.zeros_like(left_out).scatter(1, places, left_out), -math.inf)
    return scores
