# SPDX-License-Identifier: Apache-2.0
"""Reproducible sampling: which token a row draws is decided by the row's own name, not by its company.

Every (seed, prompt, sample, position) owns one uniform number, a pure function of those four (counter-based, so no
generator state exists that batching could disturb). A token is drawn by inverting the cumulative distribution at that
number in float64. Two batch compositions then differ only where float noise of the logits moves a boundary of the
distribution across the number: about once in a million tokens in fp32.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor


def uniforms(seed: int, key: str, sample_index: int, count: int) -> Tensor:
    """The uniform numbers of one response: float64 ``[count]`` in [0, 1), multiples of 2**-53.

    They come from the SHAKE-256 stream of the row's name, so they are the same on every machine and a longer response
    only adds to them.
    """
    name = f"{seed}/{sample_index}/{key}".encode()
    stream = hashlib.shake_256(name).digest(8 * count)
    words = torch.frombuffer(bytearray(stream), dtype=torch.int64)
    return ((words >> 11) & (2**53 - 1)).double() * 2.0**-53


class Draw(NamedTuple):
    """One token for each of ``B`` rows.

    Attributes:
        tokens: int64 ``[B]``.
        logprobs: float64 ``[B]``, under the *full* distribution at the sampling temperature (1 when greedy).
        excluded: float64 ``[B]``, probability of the banned tokens under that distribution.
    """

    tokens: Tensor
    logprobs: Tensor
    excluded: Tensor


def draw(logits: Tensor, uniform: Tensor | None, *, temperature: float, allowed: Tensor) -> Draw:
    """Draw one token a row from ``softmax(logits / temperature)`` restricted to the allowed tokens.

    The log-probability is that of the full distribution, banned tokens included: it is what a trainer computes with
    its log-softmax over the whole vocabulary, so the difference between the two measures numerics alone. The exact
    behaviour log-probability is ``logprobs - log1p(-excluded)``.

    Args:
        logits: ``[B, V]``, finite.
        uniform: float64 ``[B]`` in [0, 1); None takes the most likely allowed token (greedy).
        temperature: > 0; not used when greedy.
        allowed: int64 ``[A]``, ascending ids of the tokens that may be drawn.
    """
    scores = logits.double() if uniform is None else logits.double() / temperature
    log_z = scores.logsumexp(-1)
    candidates = scores[:, allowed]
    top = candidates.amax(-1)
    cumulative = (candidates - top[:, None]).exp().cumsum(-1)
    total = cumulative[:, -1]
    if uniform is None:
        index = candidates.argmax(-1)
    else:
        # Strictly below the total, so that an entry above it exists, and the first such entry has positive mass.
        target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
        index = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
    tokens = allowed[index]
    logprobs = scores.gather(1, tokens[:, None])[:, 0] - log_z
    excluded = -torch.expm1(top + total.log() - log_z).clamp(max=0.0)
    return Draw(tokens, logprobs, excluded)
