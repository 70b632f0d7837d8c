# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false
# (vLLM has an environment of its own; tests/vllm/contract holds what is used of it.)
"""Loading new weights, under their Hugging Face names, into a vLLM model that is already in use."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload


@torch.no_grad()
def reload(model: nn.Module, *, weights: Iterable[tuple[str, Tensor]], model_config: Any) -> list[str]:
    """Replace the weights of a live model, layer by layer, in the memory that they already occupy.

    vLLM's own ``reload_weights`` does nearly the same, but only logs what is missing and keeps the old weights there,
    and leaves a tied output head as it was where the head keeps a copy in another format, as it does on a CPU.

    Args:
        model: a worker's model, as vLLM has made it of its checkpoint: sharded, merged, repacked.
        weights: name and full tensor of every parameter; no tensor may change before this function returns.
        model_config: vLLM's configuration of the model.

    Returns:
        Names of the model's parameters that ``weights`` lacks.
    """
    names = {name for name, _ in model.named_parameters()}
    initialize_layerwise_reload(model)
    loaded = cast(Any, model).load_weights(weights)
    finalize_layerwise_reload(model, model_config)
    for head in _tied_heads(model):
        cast(Any, head.quant_method).process_weights_after_loading(head)
    return sorted(names - loaded)


def incomplete(missing: Sequence[str]) -> str:
    """Return the error message for parameters that did not come."""
    shown = ", ".join(missing[:5])
    return f"weight stream: {len(missing)} parameters of vLLM's model were not given, among them {shown}"


def _tied_heads(model: nn.Module) -> list[ParallelLMHead]:
    """Return the output heads that share the matrix of an embedding: a checkpoint has no tensor for them."""
    layers = [layer for layer in model.modules() if isinstance(layer, VocabParallelEmbedding)]
    embeddings = {_place(layer) for layer in layers if not isinstance(layer, ParallelLMHead)}
    return [layer for layer in layers if isinstance(layer, ParallelLMHead) and _place(layer) in embeddings]


def _place(layer: nn.Module) -> int:
    matrix: Any = layer.weight
    return matrix.data_ptr()
