# SPDX-License-Identifier: Apache-2.0
"""A stage of the policy as far as its weights go: parameters with Megatron's names and shapes, and no more."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from megatron_g2rpo.weights import WeightTable

OUTPUT = "language_model.output_layer.weight"
LAYER = re.compile(r"(language_model\.decoder\.layers\.)(\d+)\.(.+)")
TRANSFORMER_ENGINE = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


def plain_stage(
    table: WeightTable,
    tensors: Mapping[str, Tensor],
    *,
    tensor_size: int = 1,
    stage_layers: tuple[int, ...] = (3,),
    stage: int = 0,
    transformer_engine: bool = False,
) -> nn.Module:
    """One stage, its parameters full of nan.

    Args:
        table: of the model.
        tensors: the full tensors, for their names and shapes.
        tensor_size: tensor-parallel size.
        stage_layers: number of layers on each stage.
        stage: which of them.
        transformer_engine: norms are folded into linears.
    """
    first, last = stage == 0, stage == len(stage_layers) - 1
    offset = sum(stage_layers[:stage])
    model = nn.Module()
    shapes = {}
    for name, entry in table.parameters(tensors):
        shapes[name] = entry.rule.shard([tensors[hf_name] for hf_name in entry.hf_names], 0, tensor_size).shape
        layer = LAYER.fullmatch(name)
        if layer:
            number, rest = int(layer[2]) - offset, layer[3]
            if 0 <= number < stage_layers[stage]:
                rest = TRANSFORMER_ENGINE.get(rest, rest) if transformer_engine else rest
                add(model, f"{layer[1]}{number}.{rest}", shapes[name])
        elif last if name == OUTPUT or "final_layernorm" in name else first:
            add(model, name, shapes[name])
    if last and not first and OUTPUT not in shapes:  # tied
        add(model, OUTPUT, shapes["language_model.embedding.word_embeddings.weight"])
    return model


def add(model: nn.Module, name: str, shape: torch.Size) -> None:
    """Register a parameter under a dotted name."""
    *path, leaf = name.split(".")
    for part in path:
        if part not in model._modules:
            model.add_module(part, nn.Module())
        model = model.get_submodule(part)
    model.register_parameter(leaf, nn.Parameter(torch.full(shape, torch.nan)))
