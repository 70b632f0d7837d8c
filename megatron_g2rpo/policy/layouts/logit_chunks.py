# SPDX-License-Identifier: Apache-2.0
"""How ``policy.logprobs`` iterates over the logits of a micro-batch, so that they never exist as a whole.

Shape letters: L tokens with a label, C columns of the vocabulary on this rank.
"""

from __future__ import annotations

from dataclasses import dataclass

# Elementwise operations go over logits in tiles of this size, which stay in a CPU's cache: a third of the time. Not
# smaller, for a GPU's sake: at 4 TB/s it reads and writes a tile in 8 us, no less than launching a kernel takes.
TILE_BYTES = 16 * 2**20


@dataclass(frozen=True)
class LogitChunks:
    """Chunks of the logits ``[L, C]``: tokens in the forward pass, columns of the vocabulary in the backward pass.

    The backward pass goes by vocabulary because the gradient of a row of the output matrix is then one product over all
    tokens, rounded once.

    Attributes:
        tokens: L, the number of tokens with a label.
        forward: number of tokens in a chunk of the forward pass; only the first chunk may have fewer.
        kept: number of tokens, the last ones, whose logits are kept for the backward pass.
        backward: size of a chunk of the backward pass, which covers all tokens, as the number of tokens whose logits
            over the whole vocabulary take as much memory.
    """

    tokens: int
    forward: int
    kept: int
    backward: int

    @classmethod
    def of(cls, tokens: int, chunk_size: int | None) -> LogitChunks:
        """Return the chunks that hold the logits of at most ``chunk_size`` tokens at once; None sets no limit."""
        chunk_size = chunk_size or max(2 * tokens, 1)
        backward = max(chunk_size // 8, 1)
        kept = min(chunk_size - backward, tokens)
        return cls(tokens=tokens, forward=min(max(kept, 1), tokens), kept=kept, backward=min(backward, tokens))

    def of_tokens(self) -> list[slice]:
        """Return the token slices of the forward pass, first to last."""
        return [slice(max(stop - self.forward, 0), stop) for stop in range(self.tokens, 0, -self.forward or -1)][::-1]

    def of_vocabulary(self, width: int) -> list[slice]:
        """Return the column slices of the backward pass over ``width`` columns of the vocabulary."""
        return slices(width, max(self.backward * width // self.tokens, 1)) if self.tokens else []


def slices(length: int, step: int) -> list[slice]:
    """Return consecutive slices of ``step`` that cover ``length``; the last may be shorter."""
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]
