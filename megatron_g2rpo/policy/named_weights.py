# SPDX-License-Identifier: Apache-2.0
"""The weights of a policy's model by Hugging Face name, in its layout: loaded from there, and streamed back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron_g2rpo import progress, weights
from megatron_g2rpo.policy import quantized, sharded_state
from megatron_g2rpo.policy.process_groups import ParallelGroups


@dataclass(frozen=True, kw_only=True)
class NamedWeights:
    """A model's weights under their Hugging Face names; every method is a collective of the replica.

    Attributes:
        model: this rank's pipeline stage of the model, without wrapper.
        table: the weight table of the model's family.
        groups: the process groups of this rank.
        layer_offset: number of layers on earlier pipeline stages.
    """

    model: nn.Module
    table: weights.WeightTable
    groups: ParallelGroups
    layer_offset: int

    def load(self, tensors: Mapping[str, Tensor], source: str, on_loaded: sharded_state.Advance | None) -> None:
        """Copy full tensors into this rank's shards; see ``weights.load``."""
        weights.load(
            self.model,
            self.table,
            tensors,
            tensor_rank=self.groups.tensor_rank,
            tensor_size=self.groups.tensor_size,
            pipeline_group=self.groups.pipeline,
            layer_offset=self.layer_offset,
            source=source,
            on_loaded=on_loaded,
            assign=_assign,
        )

    def stream(
        self,
        tensor_of: Callable[[nn.Parameter], Tensor],
        dtype_of: Callable[[nn.Parameter], torch.dtype] | None,
    ) -> Iterator[tuple[str, Tensor]]:
        """Iterate over ``(hf_name, full_tensor)``; see ``weights.stream``."""
        for each in weights.stream(
            self.model,
            self.table,
            tensor_group=self.groups.tensor,
            pipeline_group=self.groups.pipeline,
            layer_offset=self.layer_offset,
            tensor_of=tensor_of,
            dtype_of=dtype_of,
        ):
            progress.advance()
            yield each

    def specs(self) -> dict[str, Tensor]:
        """Return what ``stream`` yields of the values, on the meta device."""
        return weights.specs(
            self.model,
            self.table,
            tensor_size=self.groups.tensor_size,
            pipeline_group=self.groups.pipeline,
            layer_offset=self.layer_offset,
        )


def _assign(parameter: nn.Parameter, value: Tensor) -> None:
    """Give a parameter its value, and say that it has it (``progress``)."""
    progress.advance()
    quantized.assign(parameter, value)
