# SPDX-License-Identifier: Apache-2.0
"""What layers in FP8 compute, in plain torch on the CPU: operands are rounded to FP8 by their recipe, then multiplied.

It shares no code with the emulation of the extension: scales are kept as Python keeps them, powers of two come from a
logarithm in double precision, blocks from loops over slices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch


class Format(NamedTuple):
    """An FP8 format: its type and its largest number."""

    dtype: torch.dtype
    maximum: float


E4M3 = Format(torch.float8_e4m3fn, 448.0)
E5M2 = Format(torch.float8_e5m2, 57344.0)


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the largest difference as a part of the largest expected value."""
    a, b = actual.detach().float().cpu(), expected.detach().float().cpu()
    return float((a.reshape(b.shape) - b).abs().max() / b.abs().max())


def rounded(x: torch.Tensor, format_: Format, scale: torch.Tensor) -> torch.Tensor:
    """Return fp32 values of ``x`` after a cast to FP8 with this scale and back."""
    return (x.float() * scale).clamp(-format_.maximum, format_.maximum).to(format_.dtype).float() / scale


@dataclass
class DelayedSlot:
    """One tensor's state under delayed scaling: amaxes of the last steps and the scale that they give."""

    format: Format
    length: int = 1024
    most_recent: bool = False
    margin: int = 0
    finished: list[float] = field(default_factory=list)
    current: float = 0.0
    scale: torch.Tensor = field(default_factory=lambda: torch.tensor(1.0))

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``x`` rounded with the scale that there is; its amax counts at the end of the step."""
        self.current = max(self.current, float(x.abs().max()))
        return rounded(x.cpu(), self.format, self.scale)

    def end_step(self) -> None:
        """Move the history on; a slot that was not used stays as it is."""
        if self.current == 0:
            return
        self.finished = [*self.finished, self.current][-self.length :]
        amax = self.current if self.most_recent else max(self.finished)
        top = torch.tensor(self.format.maximum / 2.0**self.margin)
        self.scale = top / torch.tensor(amax)
        self.current = 0.0


def tensorwise(x: torch.Tensor, format_: Format) -> torch.Tensor:
    """Return ``x`` rounded with the scale of its own amax."""
    x = x.cpu()
    return rounded(x, format_, torch.tensor(format_.maximum) / x.float().abs().max())


def power_of_two(amax: torch.Tensor, format_: Format) -> torch.Tensor:
    """Return the largest power of two that keeps an amax below the format's maximum; 1 for an amax of 0."""
    exponent = torch.floor(torch.log2(format_.maximum / amax.double()))
    return torch.where(amax == 0, torch.zeros_like(exponent), exponent).exp2().float()


def row_blocks(x: torch.Tensor, format_: Format = E4M3) -> torch.Tensor:
    """Return ``x`` [.., K] as [rows, K], each 1x128 block of it rounded with its own power of two."""
    x = x.cpu().float().reshape(-1, x.shape[-1])
    parts = []
    for block in x.split(128, dim=1):
        scale = power_of_two(block.abs().amax(1, keepdim=True), format_)
        parts.append(rounded(block, format_, scale))
    return torch.cat(parts, 1)


def tiles(w: torch.Tensor, format_: Format = E4M3) -> torch.Tensor:
    """Return ``w`` [N, K], each 128x128 tile of it rounded with its own power of two."""
    bands = []
    for band in w.cpu().float().split(128, dim=0):
        row = [rounded(tile, format_, power_of_two(tile.abs().max(), format_)) for tile in band.split(128, dim=1)]
        bands.append(torch.cat(row, 1))
    return torch.cat(bands)


class Rounded(NamedTuple):
    """The operands of a linear layer's three products, in fp32: ``y = x w^T``, ``dx = dy w``, ``dw = dy^T x``."""

    x: torch.Tensor
    w: torch.Tensor
    dy: torch.Tensor
    x_for_dw: torch.Tensor
    dy_for_dw: torch.Tensor


Rounding = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Rounded]


def delayed(slots: dict[str, DelayedSlot]) -> Rounding:
    """Return the rounding of delayed scaling with the states of "x", "w" and "dy"."""

    def of(x: torch.Tensor, w: torch.Tensor, dy: torch.Tensor) -> Rounded:
        rx, rw, rdy = slots["x"](x), slots["w"](w), slots["dy"](dy)
        return Rounded(rx, rw, rdy, rx, rdy)

    return of


def current(x: torch.Tensor, w: torch.Tensor, dy: torch.Tensor) -> Rounded:
    """Round by current scaling: gradients are e5m2 ("hybrid")."""
    rx, rw, rdy = tensorwise(x, E4M3), tensorwise(w, E4M3), tensorwise(dy, E5M2)
    return Rounded(rx, rw, rdy, rx, rdy)


def blockwise(x: torch.Tensor, w: torch.Tensor, dy: torch.Tensor) -> Rounded:
    """Round by blocks; the weight's gradient reads blocks along tokens."""
    by_token = row_blocks(x.t()).t(), row_blocks(dy.t()).t()
    return Rounded(row_blocks(x), tiles(w), row_blocks(dy), *by_token)


class Linear(NamedTuple):
    """Output and gradients of a linear layer, over tokens [tokens, ..]."""

    y: torch.Tensor
    dx: torch.Tensor
    dw: torch.Tensor
    db: torch.Tensor


def linear(rounding: Rounding, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor | None, dy: torch.Tensor) -> Linear:
    """Return what a layer with weight ``w`` [N, K] gives for ``x`` [.., K] and ``dy`` [.., N], in their type."""
    dtype = x.dtype
    x, dy = x.detach().cpu().reshape(-1, x.shape[-1]), dy.detach().cpu().reshape(-1, dy.shape[-1])
    r = rounding(x, w.detach().cpu(), dy)
    added = 0.0 if bias is None else bias.detach().cpu().float()
    y, dx, dw = r.x @ r.w.t() + added, r.dy @ r.w, r.dy_for_dw.t() @ r.x_for_dw
    return Linear(y.to(dtype), dx.to(dtype), dw.to(dtype), dy.float().sum(0).to(dtype))
