# SPDX-License-Identifier: Apache-2.0
"""The output layer of the policy: a ColumnParallelLinear that gives log-probabilities instead of logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor, nn

from megatron_g2rpo.policy.logprobs import linear_logprobs


class LogprobOutputLayer(ColumnParallelLinear):
    """The layer that takes the place of ``GPTModel.output_layer``; the logits stay inside ``linear_logprobs``.

    It is the module that holds the output matrix, as megatron-core's DDP requires: under ``overlap_param_gather`` the
    weights of a module are awaited when the module is called. Its names in a state dict are those of its base class.

    Attributes:
        vocab_size: number of tokens of the vocabulary, without padding.
        banned_token_ids: int64 ids that take no probability.
        chunk_size: number of tokens whose float32 logits are held at once; None for all.
    """

    vocab_size: int
    banned_token_ids: Tensor
    chunk_size: int | None

    @classmethod
    def adopt(
        cls,
        output_layer: ColumnParallelLinear,
        *,
        vocab_size: int,
        banned_token_ids: Sequence[int] = (),
        chunk_size: int | None = None,
        tp_group: dist.ProcessGroup,
    ) -> LogprobOutputLayer:
        """Build the layer from a ``GPTModel``'s output layer, whose Parameter it takes over.

        The Parameter is the same object; with tied embeddings neither layer has one.

        Args:
            output_layer: the ``GPTModel``'s output layer, which must not be used any more.
            vocab_size: number of tokens of the model's vocabulary, without padding.
            banned_token_ids: ids that take no probability.
            chunk_size: number of tokens whose float32 logits are held at once; None for all.
            tp_group: tensor-parallel process group.

        Raises:
            ValueError: the layer has a bias, or its configuration defers the gradient of the output matrix.
        """
        config = output_layer.config
        if output_layer.bias is not None:
            raise ValueError("an output layer with a bias is not supported")
        if config.defer_embedding_wgrad_compute:
            raise ValueError("defer_embedding_wgrad_compute is not supported by the log-probability output layer")
        layer = cls(
            input_size=output_layer.input_size,
            output_size=output_layer.output_size,
            config=config,
            init_method=nn.init.zeros_,  # not called: nothing is allocated
            bias=False,
            skip_weight_param_allocation=True,
            tp_group=tp_group,
        )
        layer.weight = output_layer.weight
        layer.vocab_size, layer.chunk_size = vocab_size, chunk_size
        # Moves with the layer, and is no part of its state.
        layer.register_buffer(
            "banned_token_ids", torch.tensor(list(banned_token_ids), dtype=torch.int64), persistent=False
        )
        return layer.train(output_layer.training)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        hidden: Tensor,
        labels: Tensor,
        weight: Tensor | None = None,
        temperature: float = 1.0,
        kept_ids: Tensor | None = None,
    ) -> Tensor:
        """Compute the labels' log-probabilities and the entropies; see ``linear_logprobs``.

        Args:
            hidden: ``[S, 1, h]`` hidden states; under sequence parallelism this tensor-parallel rank's
                ``[S / T, 1, h]``.
            labels: int64 ``[S]`` vocabulary ids, the same on every tensor-parallel rank.
            weight: the output matrix, where this layer has none of its own.
            temperature: temperature of the policy's distribution.
            kept_ids: int64 ``[K, S]``, the ids that each label was sampled from, -1 for none; None for all.

        Returns:
            float32 ``[2, S]`` log-probabilities and entropies, the same on every tensor-parallel rank.

        Raises:
            ValueError: there is no output matrix, or it does not have this layer's shape.
        """
        matrix: Any = self.weight if weight is None else weight
        if matrix is None:
            raise ValueError("a tied output layer has no matrix of its own: pass the embedding's as `weight`")
        shape = (self.output_size_per_partition, self.input_size)
        if tuple(matrix.shape) != shape:
            raise ValueError(f"the output matrix is {tuple(matrix.shape)}, not {shape}")
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(
                input_=hidden, tensor_parallel_output_grad=True, group=self.tp_group
            )
        else:
            hidden = copy_to_tensor_model_parallel_region(input_=hidden, group=self.tp_group)
        return linear_logprobs(
            hidden.squeeze(1),
            matrix,
            labels,
            vocab_size=self.vocab_size,
            temperature=temperature,
            banned_token_ids=self.banned_token_ids,
            kept_ids=kept_ids,
            group=self.tp_group,  # pyright: ignore[reportArgumentType]  # annotated by its first assignment
            chunk_size=self.chunk_size,
        )
