# SPDX-License-Identifier: Apache-2.0
"""Reproducible sampling: the tokens of a response depend on its own name, never on the other sequences of its batch.

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
    """

    tokens: Tensor
    logprobs: Tensor


def draw(logits: Tensor, uniform: Tensor | None, *, temperature: float, allowed: Tensor) -> Draw:
    """Draw one token per sequence from ``softmax(logits / temperature)`` over the allowed tokens.

    Args:
        logits: ``[B, V]``, finite.
        uniform: float64 ``[B]`` in [0, 1); None takes the most likely allowed token (greedy).
        temperature: sampling temperature, above 0; not used when greedy.
        allowed: int64 ``[A]``, ascending ids of the tokens that may be drawn; the others have probability 0.
    """
    scores = logits.double() if uniform is None else logits.double() / temperature
    scores = scores[:, allowed]
    top = scores.amax(-1)
    cumulative = (scores - top[:, None]).exp().cumsum(-1)
    total = cumulative[:, -1]
    if uniform is None:
        index = scores.argmax(-1)
    else:
        # Strictly below the total, so that an entry above it exists, and the first such entry has positive mass.
        target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
        index = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]
    logprobs = scores.gather(1, index[:, None])[:, 0] - top - total.log()
    return Draw(allowed[index], logprobs)
