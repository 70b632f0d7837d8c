# SPDX-License-Identifier: Apache-2.0
"""Claims: attention over shared prompts is that of each response over its own prompt and its own tokens, no others.

The oracle keeps the keys and values of every response in a list of its own, and attends to them in float64.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_g2rpo.rollout.transformers.prefix_cache import Prefilled, PrefixCache, Rows

KV, SHARED, WIDTH, LAYERS = 2, 3, 4, 2
SCALE = 0.4
# fp32 sums of at most 40 terms of order one.
ATOL = 1e-5


class Twin:
    """A cache beside the lists that say what it should hold."""

    def __init__(self) -> None:
        self.cache = PrefixCache(torch.device("cpu"))
        self.random = torch.Generator().manual_seed(0)
        self.prompts: list[list[tuple[Tensor, Tensor]]] = []  # [prompt][layer]
        self.own: list[list[list[tuple[Tensor, Tensor]]]] = []  # [response][layer][token]
        self.prompt_of: list[int] = []

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random)

    def prefilled(self, lengths: list[int]) -> Prefilled:
        """Random prompts, with large numbers in their padding."""
        layers = [[self.normal(KV, len(lengths), max(lengths), WIDTH) for _ in range(2)] for _ in range(LAYERS)]
        for pair in layers:
            for each in pair:
                for row, length in enumerate(lengths):
                    each[:, row, length:] = 50.0
        return Prefilled(layers=[(keys, values) for keys, values in layers], lengths=lengths)

    def rearrange(self, kept: list[int], new: list[list[int]], source: list[int], prompt: list[int]) -> None:
        added = [self.prefilled(lengths) for lengths in new]
        self.cache.rearrange(kept, added, Rows(source=source, prompt=prompt), 4)
        self.prompts = [self.prompts[place] for place in kept] + [
            [(keys[:, row, :length], values[:, row, :length]) for keys, values in each.layers]
            for each in added
            for row, length in enumerate(each.lengths)
        ]
        self.own = [self.own[row] if row >= 0 else [[] for _ in range(LAYERS)] for row in source]
        self.prompt_of = prompt

    def step(self) -> float:
        """A token of each response in all layers; the largest difference of the attention to the oracle's."""
        difference = 0.0
        for layer in range(LAYERS):
            keys, values = (self.normal(KV, len(self.own), WIDTH) for _ in range(2))
            queries = self.normal(KV, len(self.own), SHARED, WIDTH)
            self.cache.append(layer, keys, values)
            for row, own in enumerate(self.own):
                own[layer].append((keys[:, row], values[:, row]))
            found = self.cache.attend(layer, queries, SCALE)
            difference = max(difference, float((found - self.expected(layer, queries)).abs().max()))
        self.cache.advance()
        return difference

    def expected(self, layer: int, queries: Tensor) -> Tensor:
        output = torch.empty(queries.shape, dtype=torch.float64)
        for row, prompt in enumerate(self.prompt_of):
            of_prompt, own = self.prompts[prompt][layer], self.own[row][layer]
            keys, values = (
                torch.cat([of_prompt[i], torch.stack([token[i] for token in own], dim=1)], dim=1).double()
                for i in (0, 1)
            )
            weights = (SCALE * queries[:, row].double() @ keys.transpose(1, 2)).softmax(-1)
            output[:, row] = weights @ values
        return output


def grown() -> Twin:
    """Two prompts of different lengths with two responses each, and two tokens of each response."""
    twin = Twin()
    twin.rearrange([], [[7, 5]], [-1] * 4, [0, 0, 1, 1])
    assert max(twin.step(), twin.step()) <= ATOL
    return twin


def test_attention_is_that_of_each_response_alone_whatever_leaves_and_enters() -> None:
    twin = grown()
    twin.rearrange([0, 1], [], [1, 2, 3], [0, 1, 1])  # ragged: one has left
    assert max(twin.step(), twin.step()) <= ATOL
    twin.rearrange([0, 1], [[9, 8], [3]], [0, 2, -1, -1, -1, -1], [0, 1, 1, 2, 3, 4])  # others enter, at another column
    assert max(twin.step(), twin.step()) <= ATOL
    twin.rearrange([1, 2, 4], [], [1, 2, 3, 5], [0, 0, 1, 2])  # prompts leave
    assert max(twin.step(), twin.step()) <= ATOL
    twin.rearrange([0, 1, 2], [], [0, 1], [0, 0])  # prompts without responses, whose others are still to come
    assert max(twin.step(), twin.step()) <= ATOL
    twin.rearrange([0, 1, 2], [], [-1, -1], [1, 2])  # all responses are new
    assert twin.step() <= ATOL


def test_one_prompt_with_one_response() -> None:
    twin = Twin()
    twin.rearrange([], [[1]], [-1], [0])
    assert max(twin.step(), twin.step(), twin.step()) <= ATOL


def test_prompts_are_not_copied_for_their_responses() -> None:
    twin = Twin()
    twin.rearrange([], [[600, 500]], [-1] * 64, [0] * 32 + [1] * 32)
    held = sum(each.numel() for pair in (*twin.cache._prompts, *twin.cache._own) for each in pair)
    assert held == LAYERS * 2 * KV * WIDTH * (2 * 600 + 64 * 4)


def test_the_columns_of_responses_that_have_left_are_given_up() -> None:
    twin = grown()
    twin.rearrange([0, 1], [], [0, -1], [0, 1])
    twin.step(), twin.step()
    twin.rearrange([0, 1], [], [1], [1])
    assert [tuple(keys.shape) for keys, _ in twin.cache._own] == [(KV, 1, 2 + 4, WIDTH)] * LAYERS
    assert twin.step() <= ATOL


def swap_prompts(cache: PrefixCache) -> None:
    cache._prompts = [(keys.flip(1), values.flip(1)) for keys, values in cache._prompts]


def show_padding(cache: PrefixCache) -> None:
    cache._prompt_bias = None


def show_columns_before_the_first(cache: PrefixCache) -> None:
    cache._own_bias = None


def swap_siblings(cache: PrefixCache) -> None:
    order = torch.tensor([1, 0, *range(2, len(cache._own[0][0][0]))])
    cache._own = [(keys[:, order], values[:, order]) for keys, values in cache._own]


@pytest.mark.parametrize(
    "mistake",
    [swap_prompts, show_padding, show_columns_before_the_first, swap_siblings],
    ids=lambda each: each.__name__,
)
def test_a_mistake_in_who_sees_whom_is_noticed(mistake) -> None:
    twin = grown()
    twin.rearrange([0, 1], [], [0, 1, 2, -1], [0, 0, 1, 1])
    assert twin.step() <= ATOL
    mistake(twin.cache)
    assert twin.step() > 0.01
