# SPDX-License-Identifier: Apache-2.0
"""Llama and what is built like it (SmolLM2): text-only, without biases, rescaled rotary frequencies in some."""

from megatron_g2rpo import registry
from megatron_g2rpo.models.dense_decoder import DenseDecoder


@registry.model_families.register("llama")
class Llama(DenseDecoder):
    """The dense decoder as it is."""
