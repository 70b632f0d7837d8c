# SPDX-License-Identifier: Apache-2.0
"""The FP8 recipes in plain torch: transformers' model, its language linears replaced by quantised products.

Nothing here comes from Transformer Engine or megatron-core. What a recipe does is written down from its description:

    y  = Q(x) Q(w)^T        dx = Q(g) Q(w)        dw = Q(g)^T Q(x)        Q(a) = cast_fp8(clamp(a s)) / s

accumulated in float32, outputs unquantised, with a scale s = largest FP8 number / largest |a| over

- the whole tensor, as it is (``tensorwise``), or as it was at the latest earlier use (``delayed``, first scale 1);
- each 1 x 128 block of x and g along the dimension that the product sums over, and each 128 x 128 block of w
  (``blockwise``), rounded down to a power of two.

Weights are quantised once a step, before its first micro-batch. Queries, keys and values are one product, as are gate
and up projection, in megatron-core's order of rows: per group of query heads its queries, its key, its value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

BLOCK = 128


@dataclass(frozen=True)
class Fp8:
    """One recipe.

    Attributes:
        scaling: ``delayed``, ``tensorwise`` or ``blockwise``, megatron-core's ``fp8_recipe``.
        gradients: FP8 dtype of gradients; inputs and weights are ``float8_e4m3fn``.
    """

    scaling: str
    gradients: torch.dtype = torch.float8_e4m3fn


def cast(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return float32 ``x`` after a round trip through FP8 at a scale that broadcasts to it."""
    top = torch.finfo(dtype).max
    return (x.float() * scale).clamp(-top, top).to(dtype).float() * scale.reciprocal()


def scale_for(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the scale that maps the largest magnitude to the largest FP8 number; 1 where all values are 0."""
    top = torch.full_like(largest, torch.finfo(dtype).max)
    return torch.where(largest > 0, top / largest, torch.ones_like(largest))


def _power_of_two(scale: Tensor) -> Tensor:
    return torch.exp2(torch.floor(torch.log2(scale)))


def cast_blocks(x: Tensor, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Return float32 ``x [M, N]`` after FP8 with a scale for each block of ``rows x columns``, which divide it."""
    height, width = x.shape
    blocks = x.float().view(height // rows, rows, width // columns, columns)
    scale = _power_of_two(scale_for(blocks.abs().amax(dim=(1, 3), keepdim=True), dtype))
    return cast(blocks, scale, dtype).view(height, width)


class QuantisedLinear:
    """The products of one linear layer, and the scales that delayed scaling keeps between them.

    Attributes:
        scales: operand (``input``, ``weight``, ``gradient``) -> its delayed scale.
        largest: operand -> largest magnitude since the scale moved last; 0 for none.
    """

    def __init__(self, recipe: Fp8) -> None:
        self.recipe = recipe
        self.scales = {name: torch.ones(()) for name in ("input", "weight", "gradient")}
        self.largest = {name: torch.zeros(()) for name in self.scales}
        self.recording = True
        self._weight: Tensor | None = None

    def dtype(self, name: str) -> torch.dtype:
        return self.recipe.gradients if name == "gradient" else torch.float8_e4m3fn

    def forget_weight(self) -> None:
        """Have the weight quantised again at its next use."""
        self._weight = None

    def weight(self, weight: Tensor) -> Tensor:
        if self._weight is None:
            self._weight = self.operand("weight", weight)[0]
        return self._weight

    def operand(self, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``x [M, N]`` quantised for a product that sums over N, and for one that sums over M."""
        dtype = self.dtype(name)
        if self.recipe.scaling == "blockwise":
            if name == "weight":
                whole = cast_blocks(x, BLOCK, BLOCK, dtype)
                return whole, whole
            return cast_blocks(x, 1, BLOCK, dtype), cast_blocks(x, BLOCK, 1, dtype)
        largest = x.detach().abs().max().float()
        if self.recipe.scaling == "tensorwise":
            whole = cast(x, scale_for(largest, dtype), dtype)
        else:
            whole = cast(x, self.scales[name], dtype)
            if self.recording:
                self.largest[name] = torch.maximum(self.largest[name], largest)
        return whole, whole

    def move(self, *names: str) -> None:
        """Set the scales for the next use from the largest magnitude that was seen.

        The recipe's history has 1024 passes, more than a test makes: it forgets none of them.
        """
        for name in names:
            if self.largest[name] > 0:
                self.scales[name] = scale_for(self.largest[name], self.dtype(name))

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        out: Tensor = _Product.apply(x.reshape(-1, x.shape[-1]), weight, self)  # pyright: ignore[reportAssignmentType]
        return out.view(*x.shape[:-1], -1)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, linear: QuantisedLinear) -> Tensor:
        by_features, by_tokens = linear.operand("input", x)
        quantised = linear.weight(weight)
        ctx.save_for_backward(by_tokens, quantised)
        ctx.linear, ctx.dtype = linear, x.dtype
        return (by_features @ quantised.t()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        by_features, by_tokens = ctx.linear.operand("gradient", gradients[0])
        return (by_features @ weight).to(ctx.dtype), (by_tokens.t() @ x).to(ctx.dtype), None


class _Part(nn.Module):
    """One of several projections of the same input that are computed together, when the first is asked for."""

    def __init__(self, together: _Together, index: int, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
        self._together, self._index = [together], index  # in a list: not a submodule

    def forward(self, x: Tensor) -> Tensor:
        together = self._together[0]
        if self._index == 0:
            together.compute(x)
        return together.outputs[self._index]


class _Together:
    def __init__(self, linear: QuantisedLinear, projections: list[nn.Module], order: Tensor) -> None:
        self.linear, self.order = linear, order
        weights = [projection.get_parameter("weight") for projection in projections]
        self.sizes = [len(weight) for weight in weights]
        self.parts = [_Part(self, index, weight) for index, weight in enumerate(weights)]
        self.outputs: tuple[Tensor, ...] = ()

    def compute(self, x: Tensor) -> None:
        weight = torch.cat([part.weight for part in self.parts])[self.order]
        self.outputs = self.linear(x, weight)[..., self.order.argsort()].split(self.sizes, dim=-1)


def _row_order(queries: int, groups: int, head: int) -> Tensor:
    """Return megatron-core's order of the rows of ``[q; k; v]``, of ``queries`` query heads in ``groups`` groups."""
    rows = torch.arange((queries + 2 * groups) * head).view(-1, head)
    q, k, v = rows[:queries].view(groups, -1), rows[queries : queries + groups], rows[queries + groups :]
    return torch.cat([q, k, v], dim=1).flatten()


class Reference:
    """transformers' Qwen3-VL with FP8 language linears; everything else of it is left as it is.

    Args:
        model: the model; it is changed.
        recipe: the recipe.
        plain_layers: layers that stay unquantised.

    Attributes:
        linears: name of a linear as in megatron-core (``0.linear_qkv``) -> its products and scales.
    """

    def __init__(self, model: Any, recipe: Fp8, plain_layers: tuple[int, ...] = ()) -> None:
        self.model = model
        self.linears: dict[str, QuantisedLinear] = {}
        text = model.config.text_config
        order = _row_order(text.num_attention_heads, text.num_key_value_heads, text.head_dim)
        for index, layer in enumerate(model.model.language_model.layers):
            if index in plain_layers:
                continue
            attention, mlp = layer.self_attn, layer.mlp
            rows = torch.arange(2 * text.intermediate_size)
            for owner, names, name, rows_of in (
                (attention, ("q_proj", "k_proj", "v_proj"), "linear_qkv", order),
                (attention, ("o_proj",), "linear_proj", torch.arange(text.hidden_size)),
                (mlp, ("gate_proj", "up_proj"), "linear_fc1", rows),
                (mlp, ("down_proj",), "linear_fc2", torch.arange(text.hidden_size)),
            ):
                linear = self.linears[f"{index}.{name}"] = QuantisedLinear(recipe)
                together = _Together(linear, [getattr(owner, old) for old in names], rows_of)
                for old, part in zip(names, together.parts, strict=True):
                    setattr(owner, old, part)

    def begin_pass(self, *, recording: bool) -> None:
        """Start a pass over micro-batches: weights are quantised again; one without gradient is not ``recording``."""
        for linear in self.linears.values():
            linear.forget_weight()
            linear.recording = recording

    def end_forward(self) -> None:
        """Move the scales of inputs and weights, after the forward pass of a micro-batch that has a backward pass."""
        for linear in self.linears.values():
            linear.move("input", "weight")

    def end_backward(self) -> None:
        """Move the scales of gradients, after the backward pass of a micro-batch."""
        for linear in self.linears.values():
            linear.move("gradient")
