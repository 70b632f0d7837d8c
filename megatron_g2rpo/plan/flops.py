# SPDX-License-Identifier: Apache-2.0
"""Floating-point operations of a forward pass, by part; a product of [m, k] and [k, n] has 2 m k n.

Norms, rotations and activations are left out: they are bound by memory, and the assumed efficiencies cover them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_g2rpo.models.rotary import head_dim
from megatron_g2rpo.plan.model import Model
from megatron_g2rpo.plan.vision import geometry_of, sees
from megatron_g2rpo.policy.layouts.layout import Layout


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What operations and bytes of a model's passes depend on.

    Attributes:
        layers: number of language layers.
        linear: weight elements of a layer that a token is multiplied with; of a mixture of experts, those of the
            experts that it visits.
        attention: features of the queries, heads x head dimension.
        cached: numbers of a layer's keys and values of one token.
        hidden: hidden size of the language model.
        vocabulary: number of tokens of the vocabulary.
        weights: weight elements of the whole model.
        tower: weight elements of the vision tower that a patch is multiplied with; 0 for a text-only model.
        patches: patches of an image token.
        tower_width, tower_layers: hidden size and number of blocks of the vision tower.
    """

    layers: int
    linear: int
    attention: int
    cached: int
    hidden: int
    vocabulary: int
    weights: int
    tower: int = 0
    patches: int = 0
    tower_width: int = 0
    tower_layers: int = 0


def shape_of(model: Model) -> Shape:
    """Return the shape of a dense model."""
    config: Any = model.config
    text, images = config.get_text_config(), sees(config)
    hidden, heads = text.hidden_size, text.num_attention_heads * head_dim(text)
    keys = text.num_key_value_heads * head_dim(text)
    tower = 0
    if images:
        parameters = model.stage_parameters(Layout(), 0, freeze_vision=False)
        tower = sum(parameter.numel for parameter in parameters if parameter.is_vision)
    return Shape(
        layers=text.num_hidden_layers,
        linear=hidden * (2 * heads + 2 * keys) + 3 * hidden * text.intermediate_size,
        attention=heads,
        cached=2 * keys,
        hidden=hidden,
        vocabulary=text.vocab_size,
        weights=model.numel,
        tower=tower,
        patches=geometry_of(config).merge ** 2 if images else 0,
        tower_width=config.vision_config.hidden_size if images else 0,
        tower_layers=config.vision_config.depth if images else 0,
    )


@dataclass(frozen=True, kw_only=True)
class Flops:
    """Operations of a forward pass, by part.

    Attributes:
        linear: matrix products of the language layers, which FP8 speeds up.
        attention: scores and weighted values of the core attention.
        logits: the output layer, at the tokens that predict one of a response.
        vision: the vision tower with its mergers, each image once.
    """

    linear: float
    attention: float
    logits: float
    vision: float

    @property
    def total(self) -> float:
        """Operations of the whole pass."""
        return self.linear + self.attention + self.logits + self.vision


def causal_pairs(tokens: float, before: float = 0) -> float:
    """Return how many pairs of a query and a key the core attention of consecutive tokens has.

    Args:
        tokens: number of queries, each of which sees the keys up to its own: half of the square.
        before: number of keys before the first query, which all of them see: those of a prompt that answers share.
    """
    return tokens * before + tokens**2 / 2


def forward(shape: Shape, *, tokens: float, pairs: float, labels: float, images: float, image_tokens: int) -> Flops:
    """Return the operations of a forward pass.

    Args:
        shape: the model.
        tokens: number of tokens that pass through the layers.
        pairs: number of pairs of a query and a key, see ``causal_pairs``.
        labels: number of tokens whose logits are computed.
        images: number of images.
        image_tokens: number of tokens of each image, after merging.
    """
    patches = image_tokens * shape.patches
    # Positions see each other only within an image, where all see all.
    tower = 2 * shape.tower * patches + 4 * shape.tower_layers * shape.tower_width * patches**2
    return Flops(
        linear=2 * shape.layers * shape.linear * tokens,
        attention=4 * shape.layers * shape.attention * pairs,
        logits=2 * shape.hidden * shape.vocabulary * labels,
        vision=images * tower,
    )
