# SPDX-License-Identifier: Apache-2.0
"""Names and shapes of a model's Hugging Face tensors, from the model that transformers builds of a configuration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.initialization import no_init_weights


def model_class(hf_config: Any) -> type[AutoModelForCausalLM] | type[AutoModelForImageTextToText]:
    """Return the class whose ``from_config`` builds the model, vision-language or text-only."""
    return AutoModelForCausalLM if getattr(hf_config, "vision_config", None) is None else AutoModelForImageTextToText


def published_tensors(hf_config: Any) -> dict[str, Tensor]:
    """Return all parameters of the model by Hugging Face name, on the meta device, without a tied output matrix."""
    with torch.device("meta"), no_init_weights():
        model = model_class(hf_config).from_config(hf_config, trust_remote_code=False)
    model.tie_weights()
    return {name: parameter.data for name, parameter in model.named_parameters()}
