# SPDX-License-Identifier: Apache-2.0
"""Deepstack: vision features of several depths are added after the first language layers.

The features travel as ``context``, an argument that megatron-core's block already hands to every layer and treats as a
checkpoint input, so that activation recomputation stays right (features kept aside in a hook would be lost there).
"""

from __future__ import annotations

from typing import Any, cast

from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor


class DeepstackLayer(TransformerLayer):
    """A transformer layer that adds its deepstack feature to its output.

    ``context`` is dense ``[K, s, b, h]``: feature k belongs after layer k + 1 (1-based, global over pipeline stages)
    and is zero on text tokens; None when the row has no image or the stage lies beyond the features.
    """

    def forward(self, *args: Any, context: Tensor | None = None, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Run the layer, then add its deepstack feature; other shapes are those of ``TransformerLayer.forward``."""
        # megatron-core leaves the result without annotation.
        hidden, _ = cast(tuple[Tensor, Any], super().forward(*args, context=None, **kwargs))
        if context is not None and self.layer_number <= context.shape[0]:
            hidden = hidden + context[self.layer_number - 1]
        return hidden, context
