# SPDX-License-Identifier: Apache-2.0
"""Llama and models of its architecture (SmolLM2): text-only, without biases; some rescale rotary frequencies."""

from megatron_g2rpo import registry
from megatron_g2rpo.models.dense_decoder import DenseDecoder


@registry.model_families.register("llama")
class Llama(DenseDecoder):
    """Llama: the dense decoder without changes."""
