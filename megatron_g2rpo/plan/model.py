# SPDX-License-Identifier: Apache-2.0
"""Reads a model's config.json and derives from it every parameter of every pipeline stage, exactly.

No weight is read: transformers builds the model on torch's meta device, where tensors have shapes and no memory, and
the weight table's own shard rules cut them as they would cut a checkpoint.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_g2rpo import models
from megatron_g2rpo.models.directory import load_config, local_model_dir
from megatron_g2rpo.policy.layouts.layout import Layout
from megatron_g2rpo.weights.hf_model import published_tensors
from megatron_g2rpo.weights.rules import Replicated

CONFIG = "config.json"
_EMBEDDING = "language_model.embedding.word_embeddings.weight"
_OUTPUT = "language_model.output_layer.weight"


class ModelConfigError(ValueError):
    """The model has no config.json, or one that ``plan`` does not support."""


@dataclass(frozen=True)
class Parameter:
    """One parameter, as one rank holds it.

    Attributes:
        name: the parameter's Megatron name; layers are numbered over all pipeline stages.
        numel: number of elements of the rank's shard.
        replicated: whether every tensor-parallel rank holds the whole parameter.
        trains: whether it is trained; a frozen parameter has neither gradient nor optimizer state.
        shared: whether it is a tied embedding that another pipeline stage holds as well; DDP gives it a bucket of its
            own.
        sequence_parallel: whether ``finalize_model_grads`` sums its gradient over tensor-parallel ranks.
    """

    name: str
    numel: int
    replicated: bool
    trains: bool
    shared: bool
    sequence_parallel: bool

    @property
    def is_vision(self) -> bool:
        """Whether it belongs to the vision tower."""
        return self.name.startswith("vision_model.")


def config_dir(name: str) -> Path:
    """Return the directory that holds the config.json of ``policy.model_name``; nothing else is downloaded.

    Args:
        name: a directory with a config.json, or the name of a model on the Hugging Face hub.

    Raises:
        ModelConfigError: there is no such directory or model; says what to do.
    """
    try:
        directory = local_model_dir(name, only=CONFIG)
    except FileNotFoundError as error:
        raise ModelConfigError(
            f"{error}; without a network pass policy.model_name=DIR, a directory that holds the model's {CONFIG} "
            "(weights are not needed)"
        ) from error
    if not (directory / CONFIG).is_file():
        raise ModelConfigError(f"policy.model_name: the directory {name} has no {CONFIG}, which is what a plan reads")
    return directory


def read_config(name: str) -> Any:
    """Return transformers' configuration of ``policy.model_name``.

    Args:
        name: see ``config_dir``.

    Raises:
        ModelConfigError: see ``config_dir``; or the model's family is unknown.
    """
    directory = config_dir(name)
    try:
        config = load_config(directory)
        models.family(config.model_type)
    except ValueError as error:
        raise ModelConfigError(f"policy.model_name: {name}: {error}") from error
    return config


class Model:
    """A model's parameters, as each rank holds them.

    Args:
        hf_config: transformers' configuration of the model.

    Attributes:
        config: transformers' configuration of the model.
        tied: whether the output matrix is the embedding.
        tensors: all parameters by Hugging Face name, on the meta device.
    """

    def __init__(self, hf_config: Any) -> None:
        self.config = hf_config
        self.tied = bool(hf_config.tie_word_embeddings)
        self.tensors: dict[str, Tensor] = published_tensors(hf_config)
        self._entries = models.family(hf_config.model_type).weights(hf_config).parameters(self.tensors)
        self._numel = sum(tensor.numel() for tensor in self.tensors.values())
        self._numels: dict[int, list[int]] = {}
        self._stages: dict[tuple[Layout, int, bool], list[Parameter]] = {}

    @property
    def numel(self) -> int:
        """Number of elements of the whole model's parameters; a tied output matrix counts once, as the embedding."""
        return self._numel

    def stage_parameters(self, layout: Layout, stage: int, *, freeze_vision: bool) -> list[Parameter]:
        """Return the parameters of one rank of a pipeline stage, in the order of the policy's ``named_parameters()``.

        Tensor-parallel ranks hold shards of equal size, so which of them it is makes no difference.
        """
        key = (layout, stage, freeze_vision)
        if key not in self._stages:
            self._stages[key] = self._parameters(layout, stage, freeze_vision)
        return self._stages[key]

    def _shards(self, tensor: int) -> list[int]:
        """Return the elements of each parameter's shard, in the order of the weight table."""
        if tensor not in self._numels:
            self._numels[tensor] = [
                entry.rule.shard([self.tensors[hf] for hf in entry.hf_names], 0, tensor).numel()
                for _, entry in self._entries
            ]
        return self._numels[tensor]

    def _parameters(self, layout: Layout, stage: int, freeze_vision: bool) -> list[Parameter]:
        counts = layout.stage_layers(self.config.get_text_config().num_hidden_layers)
        first, last = sum(counts[:stage]), sum(counts[: stage + 1])
        shared = self.tied and layout.pipeline > 1
        chosen = []
        for (name, entry), numel in zip(self._entries, self._shards(layout.tensor), strict=True):
            place = _stage_of(name, layout.pipeline)
            layer = _layer(name)
            names = [name] if (place == stage if layer is None else first <= layer < last) else []
            if name == _EMBEDDING and shared and stage == layout.pipeline - 1:
                names = [_OUTPUT]  # the copy that the last stage works with
            for held in names:
                chosen.append(
                    Parameter(
                        name=held,
                        numel=numel,
                        replicated=isinstance(entry.rule, Replicated),
                        trains=not (freeze_vision and held.startswith("vision_model.")),
                        shared=shared and name == _EMBEDDING,
                        sequence_parallel=_summed_over_tensor_ranks(held, layout),
                    )
                )
        return sorted(chosen, key=lambda parameter: _order(parameter.name))


def _stage_of(name: str, stages: int) -> int | None:
    """Return the pipeline stage of a parameter that belongs to no layer."""
    if name == _OUTPUT or "final_layernorm" in name:
        return stages - 1
    return 0


def _layer(name: str) -> int | None:
    found = re.search(r"decoder\.layers\.(\d+)\.", name)
    return int(found[1]) if found else None


def _summed_over_tensor_ranks(name: str, layout: Layout) -> bool:
    if "q_layernorm" in name or "k_layernorm" in name:
        return layout.tensor > 1
    return layout.sequence_parallel and name.endswith("layernorm.weight")


# Modules in the order in which megatron-core's constructors add them; DDP lays its buffers out by that order.
_MODULES = (
    "vision_model",
    "embedding",
    "layers",
    "final_layernorm",
    "output_layer",
)
_LAYER_MODULES = (
    "input_layernorm",
    "linear_proj",
    "linear_qkv",
    "q_layernorm",
    "k_layernorm",
    "pre_mlp_layernorm",
    "linear_fc1",
    "linear_fc2",
)


def _order(name: str) -> tuple[int, int, int]:
    """Return the key to sort by; parameters of the vision tower keep the order that transformers gives them."""
    parts = name.split(".")
    module = next(index for index, part in enumerate(_MODULES) if part in parts)
    layer = _layer(name)
    if layer is None or module == 0:
        return module, 0, 0
    return module, layer, next(index for index, part in enumerate(_LAYER_MODULES) if part in parts)
