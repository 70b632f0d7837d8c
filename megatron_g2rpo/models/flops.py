# SPDX-License-Identifier: Apache-2.0
"""Floating-point operations of a forward pass, by part; a product of [m, k] and [k, n] has 2 m k n.

Norms, rotations and activations are left out: they are bound by memory. Read by ``plan``, which assumes lengths, and by
the trainer, which counts what it computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from megatron_g2rpo.models.base import family
from megatron_g2rpo.models.rotary import head_dim


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


def shape_of(hf_config: Any, *, weights: int = 0) -> Shape:
    """Return the shape of a dense model.

    Args:
        hf_config: transformers' configuration of the model.
        weights: weight elements of the whole model, where they are of interest.
    """
    text, vision = hf_config.get_text_config(), family(hf_config.model_type).vision
    hidden, heads = text.hidden_size, text.num_attention_heads * head_dim(text)
    keys = text.num_key_value_heads * head_dim(text)
    tower = patches = 0
    if vision is not None:
        patches = vision.geometry(hf_config).merge ** 2
        with torch.device("meta"):
            tower = _tower_products(vision.tower(hf_config, torch.float32), patches)
    return Shape(
        layers=text.num_hidden_layers,
        linear=hidden * (2 * heads + 2 * keys) + 3 * hidden * text.intermediate_size,
        attention=heads,
        cached=2 * keys,
        hidden=hidden,
        vocabulary=text.vocab_size,
        weights=weights,
        tower=tower,
        patches=patches,
        tower_width=hf_config.vision_config.hidden_size if vision is not None else 0,
        tower_layers=hf_config.vision_config.depth if vision is not None else 0,
    )


def _tower_products(tower: nn.Module, patches: int) -> int:
    """Return the weight elements that a patch is multiplied with; mergers see ``patches`` of them at once."""
    weights = [
        (name, module.weight.numel())
        for name, module in tower.named_modules()
        if isinstance(module, nn.Linear | nn.Conv3d)
    ]
    merged = sum(numel for name, numel in weights if "merger" in name)
    return sum(numel for _, numel in weights) - merged + merged // patches


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
    return Flops(
        linear=2 * shape.layers * shape.linear * tokens,
        attention=4 * shape.layers * shape.attention * pairs,
        logits=2 * shape.hidden * shape.vocabulary * labels,
        vision=images * vision(shape, patches=patches, pairs=patches**2),
    )


def vision(shape: Shape, *, patches: float, pairs: float) -> float:
    """Return the operations of a forward pass of the vision tower.

    Args:
        shape: the model.
        patches: number of patches, before merging.
        pairs: number of pairs of patches that see each other: all those of an image do, and no others.
    """
    return 2 * shape.tower * patches + 4 * shape.tower_layers * shape.tower_width * pairs
