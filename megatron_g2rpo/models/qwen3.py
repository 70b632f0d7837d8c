# SPDX-License-Identifier: Apache-2.0
"""Qwen3, dense and text-only: queries and keys are normalised."""

from megatron_g2rpo import registry
from megatron_g2rpo.models.dense_decoder import DenseDecoder


@registry.model_families.register("qwen3")
class Qwen3(DenseDecoder):
    """Qwen3: a dense decoder that normalises queries and keys."""

    head_norms = True
