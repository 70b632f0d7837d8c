# SPDX-License-Identifier: Apache-2.0
"""How ``policy.logprobs`` goes through the logits of a micro-batch, so that they never exist as a whole.

Shape letters: L tokens with a label, C columns of the vocabulary on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass

# Elementwise operations go over logits in tiles of this size, which stay in a CPU's cache: a third of the time. Not
# smaller, for a GPU's sake: at 4 TB/s it reads and writes a tile in 8 us, no less than launching a kernel takes.
TILE_BYTES = 16 * 2**20


@dataclass(frozen=True)
class LogitChunks:
    """How the logits ``[L, C]`` are gone through: by tokens in the forward pass, by vocabulary in the backward pass.

    By vocabulary, because the gradient of a row of the matrix is then one product over all tokens, rounded once.

    Attributes:
        tokens: L.
        forward: tokens in a chunk of the forward pass; the last chunk has as many, the first may have fewer.
        kept: tokens, the last ones, whose logits are kept for the backward pass.
        backward: a chunk of the backward pass has as many logits, of all tokens, as the forward pass for these.
    """

    tokens: int
    forward: int
    kept: int
    backward: int

    @classmethod
    def of(cls, tokens: int, chunk_size: int | None) -> LogitChunks:
        """Logits of ``chunk_size`` tokens are held at once; None for no limit."""
        chunk_size = chunk_size or max(2 * tokens, 1)
        backward = max(chunk_size // 8, 1)
        kept = min(chunk_size - backward, tokens)
        return cls(tokens=tokens, forward=min(max(kept, 1), tokens), kept=kept, backward=min(backward, tokens))

    def of_tokens(self) -> list[slice]:
        """Chunks of the forward pass, first to last."""
        return [slice(max(stop - self.forward, 0), stop) for stop in range(self.tokens, 0, -self.forward or -1)][::-1]

    def of_vocabulary(self, width: int) -> list[slice]:
        """Chunks of the backward pass over ``width`` columns of the vocabulary."""
        return slices(width, max(self.backward * width // self.tokens, 1)) if self.tokens else []


def slices(length: int, step: int) -> list[slice]:
    """Consecutive slices of ``step`` that cover ``length``; the last may be shorter."""
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]
