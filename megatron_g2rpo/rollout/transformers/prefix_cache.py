# SPDX-License-Identifier: Apache-2.0
"""Keys and values of prompts and of what is decoded after them: a prompt's lie there once, for all of its responses.

A response attends to its prompt and to itself. One softmax goes over the scores of both, which two batched products
give: the queries of all responses to a prompt, one matrix, times the prompt's keys; and each response's queries times
its own keys. No key is copied, neither for each response nor for each head that shares it.

Responses that began at different times lie in one buffer: at a step each writes the same column, and attends to the
columns from its first one on. Rotary positions are in the keys, so a column says nothing but when it was written.

Shape letters: ``K`` key/value heads, ``R`` query heads that share one, ``D`` width of a head, ``G`` prompts, ``P``
tokens of the longest of them, ``B`` responses, ``M`` responses to the prompt that has most, ``C`` columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# One layer's keys and values, or those of all layers.
KeysValues = tuple[Tensor, Tensor]


@dataclass(frozen=True, kw_only=True)
class Prefilled:
    """Keys and values of prompts that were prefilled together, padded on the right.

    Attributes:
        layers: keys and values of each layer, each ``[K, prompts, P, D]``.
        lengths: number of tokens of each prompt.
    """

    layers: Sequence[KeysValues]
    lengths: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The responses of a cache, in the order of their prompts.

    Attributes:
        source: for each response its place among those of before, -1 for a new one.
        prompt: for each response the place of its prompt, in ascending order.
    """

    source: Sequence[int]
    prompt: Sequence[int]


class _Grid(NamedTuple):
    """Responses in a table with a row for each prompt, where some prompts have more responses than others.

    Attributes:
        rows: int64 ``[G * M]``, the response in each cell; an empty cell repeats response 0, and nobody reads it.
        cells: int64 ``[B]``, the cell of each response.
    """

    rows: Tensor
    cells: Tensor


class PrefixCache:
    """The keys and values of all layers, and the attention over them.

    Args:
        device: the device of its tensors.

    Attributes:
        free_columns: number of tokens a response that can be written before ``rearrange`` must be called.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._lengths: list[int] = []
        self._begins: list[int] = []  # the first column of each response
        self._columns = 0
        self._prompts: list[KeysValues] = []
        self._own: list[KeysValues] = []
        self._grid: _Grid | None = None
        self._prompt_bias: Tensor | None = None
        self._own_bias: Tensor | None = None
        self._capacity = 0

    @property
    def free_columns(self) -> int:
        return self._capacity - self._columns

    @property
    def num_prompts(self) -> int:
        """Number of prompts whose keys and values are here."""
        return len(self._lengths)

    def rearrange(self, kept: Sequence[int], new: Sequence[Prefilled], rows: Rows, free_columns: int) -> None:
        """Drop prompts and responses, add others, and make room for what is decoded next.

        Args:
            kept: places of the prompts that stay, in their order; the new ones follow them.
            new: the prompts that are added.
            rows: the responses from now on.
            free_columns: number of tokens a response for which there is room then.
        """
        layers = len(self._prompts) or len(new[0].layers)
        begins = [self._begins[source] if source >= 0 else self._columns for source in rows.source]
        first = min(begins, default=self._columns)
        lengths = [self._lengths[place] for place in kept] + [length for each in new for length in each.lengths]
        before = list(self._own)
        same_prompts = not new and len(kept) == len(self._lengths)
        for layer in range(layers):  # one after the other: one layer is there twice
            if not same_prompts:
                prompts = self._joined(layer, kept, new, max(lengths))
                self._prompts[layer : layer + 1] = [prompts]
            like = self._prompts[layer][0]
            own = before.pop(0) if before else None
            self._own[layer : layer + 1] = [self._moved(like, own, rows.source, first, free_columns)]
        self._lengths, self._begins = lengths, [begin - first for begin in begins]
        self._columns -= first
        self._capacity = self._columns + free_columns
        self._arrange(rows)

    def _joined(self, layer: int, kept: Sequence[int], new: Sequence[Prefilled], longest: int) -> KeysValues:
        """Return a layer's keys and values of the prompts that stay and of the new ones, ``[K, G, P, D]``."""
        both = []
        for which in (0, 1):
            parts = [each.layers[layer][which] for each in new]
            if kept:
                old = self._prompts[layer][which]
                parts.insert(0, old.index_select(1, torch.tensor(kept, device=self._device)))
            if len(parts) == 1:
                both.append(parts[0][:, :, :longest].contiguous())
                continue
            heads, _, _, width = parts[0].shape
            # Zeros, not whatever memory holds: nothing attends to the padding, but 0 times NaN is NaN.
            joined = parts[0].new_zeros(heads, sum(part.shape[1] for part in parts), longest, width)
            place = 0
            for part in parts:
                length = min(longest, part.shape[2])
                joined[:, place : place + part.shape[1], :length] = part[:, :, :length]
                place += part.shape[1]
            both.append(joined)
        return both[0], both[1]

    def _moved(
        self, like: Tensor, own: KeysValues | None, source: Sequence[int], first: int, free_columns: int
    ) -> KeysValues:
        """Return a layer's own keys and values of the responses, ``[K, B, C, D]``, from column ``first`` on."""
        heads, _, _, width = like.shape
        used = self._columns - first
        shape = (heads, len(source), used + free_columns, width)
        if not used:
            return like.new_empty(shape), like.new_empty(shape)
        assert own is not None
        old = [(place, row) for place, row in enumerate(source) if row >= 0]
        places, rows = (torch.tensor(each, device=self._device) for each in zip(*old, strict=True))
        moved = []
        for buffer in own:
            columns = buffer[:, :, first : self._columns]
            new = like.new_empty(shape)
            if len(old) == len(source):
                torch.index_select(columns, 1, rows, out=new[:, :, :used])
            else:
                new[:, :, :used] = 0  # as with the padding of prompts
                new[:, places, :used] = columns[:, rows]
            moved.append(new)
        return moved[0], moved[1]

    def _arrange(self, rows: Rows) -> None:
        """Note which response belongs to which prompt, and what none may attend to."""
        counts = [0] * len(self._lengths)
        cells = []
        for prompt in rows.prompt:
            cells.append((prompt, counts[prompt]))
            counts[prompt] += 1
        most = max(counts, default=0)
        self._grid = None
        if len(set(counts)) > 1:
            place = torch.tensor([prompt * most + number for prompt, number in cells], device=self._device)
            row = torch.zeros(len(counts) * most, dtype=torch.int64, device=self._device)
            row[place] = torch.arange(len(place), device=self._device)
            self._grid = _Grid(row, place)
        keys = self._prompts[0][0]
        heads = len(keys)
        self._prompt_bias = self._own_bias = None
        if len(set(self._lengths)) > 1:
            lengths = torch.tensor(self._lengths, device=self._device)
            hidden = torch.arange(keys.shape[2], device=self._device) >= lengths[:, None]
            self._prompt_bias = _bias(hidden, heads, keys.dtype)
        if any(self._begins):
            begins = torch.tensor(self._begins, device=self._device)
            hidden = torch.arange(self._capacity, device=self._device) < begins[:, None]
            self._own_bias = _bias(hidden, heads, keys.dtype)

    def append(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Write a token of each response; ``advance`` follows when all layers have written theirs.

        Args:
            layer: number of the layer.
            keys, values: ``[K, B, D]``; the keys are rotated to their positions.
        """
        own_keys, own_values = self._own[layer]
        own_keys[:, :, self._columns] = keys
        own_values[:, :, self._columns] = values

    def advance(self) -> None:
        """Go on to the next token of each response."""
        self._columns += 1

    def attend(self, layer: int, queries: Tensor, scale: float) -> Tensor:
        """Return what the responses' queries take of their prompts and of themselves, the token just written included.

        Args:
            layer: number of the layer.
            queries: ``[K, B, R, D]``, rotated to their positions.
            scale: factor of the scores.

        Returns:
            ``[K, B, R, D]``.
        """
        heads, responses, shared, width = queries.shape
        prompt_keys, prompt_values = (each.flatten(0, 1) for each in self._prompts[layer])
        own_keys, own_values = (each.flatten(0, 1)[:, : self._columns + 1] for each in self._own[layer])
        prompts, length, _ = prompt_keys.shape
        of_prompts = _scores(
            self._in_cells(queries).reshape(prompts, -1, width), prompt_keys, self._prompt_bias, scale
        ).view(heads, -1, shared, length)
        of_own = _scores(queries.reshape(heads * responses, shared, width), own_keys, self._own_bias, scale)
        scores = torch.cat([self._in_rows(of_prompts), of_own.view(heads, responses, shared, -1)], dim=-1)
        weights = scores.softmax(-1, dtype=torch.float32).to(queries.dtype)
        of_prompts = self._in_cells(weights[..., :length]).view(prompts, -1, length)
        output = self._in_rows(torch.bmm(of_prompts, prompt_values).view(heads, -1, shared, width))
        return torch.baddbmm(
            output.reshape(heads * responses, shared, width),
            weights[..., length:].view(heads * responses, shared, -1),
            own_values,
        ).view(heads, responses, shared, width)

    def _in_cells(self, values: Tensor) -> Tensor:
        """Return ``[K, B, ...]`` as ``[K, G * M, ...]``."""
        return values if self._grid is None else values.index_select(1, self._grid.rows)

    def _in_rows(self, values: Tensor) -> Tensor:
        """Return ``[K, G * M, ...]`` as ``[K, B, ...]``."""
        return values if self._grid is None else values.index_select(1, self._grid.cells)


def _scores(queries: Tensor, keys: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Return ``[N, Q, L]``, ``scale * queries @ keys + bias``, of ``[N, Q, D]``, ``[N, L, D]`` and ``[N, 1, L...]``."""
    length = keys.shape[1]
    if bias is None:
        nothing = queries.new_empty(1, 1, 1)
        return torch.baddbmm(nothing, queries, keys.transpose(1, 2), beta=0, alpha=scale)
    return torch.baddbmm(bias[:, :, :length], queries, keys.transpose(1, 2), alpha=scale)


def _bias(hidden: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """Return ``[K * N, 1, L]`` of bool ``[N, L]``: minus infinity where it is True, 0 elsewhere."""
    bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -math.inf)
    return bias.repeat(heads, 1)[:, None]
