# SPDX-License-Identifier: Apache-2.0
"""Bytes of the weights that are quantised to FP8: which of them are, their copies, and what ``fp8_param`` saves."""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_g2rpo.plan.buffers import Fp8Weights
from megatron_g2rpo.plan.model import Parameter
from megatron_g2rpo.plan.sizes import Modules
from megatron_g2rpo.recipe import MegatronConfig

_QUANTISED = re.compile(r"decoder\.layers\.(\d+)\..*\.linear_(qkv|proj|fc1|fc2)\.weight")


def quantised(parameters: Sequence[Parameter], num_layers: int, megatron: MegatronConfig, modules: Modules) -> int:
    """Return the number of a rank's weight elements that matrix products read in FP8.

    Args:
        parameters: the rank's parameters.
        num_layers: number of language layers of the whole model.
        megatron: the recipe's ``policy.megatron_cfg``; its ``first_last_layers_bf16`` keeps layers out.
        modules: what the layers are made of.
    """
    if modules.fp8 is None:
        return 0
    start, end = 0, num_layers
    if megatron.first_last_layers_bf16:
        start, end = megatron.num_layers_at_start_in_bf16, num_layers - megatron.num_layers_at_end_in_bf16
    matches = ((_QUANTISED.search(parameter.name), parameter) for parameter in parameters if not parameter.is_vision)
    return sum(parameter.numel for match, parameter in matches if match and start <= int(match[1]) < end)


def weights(parameters: Sequence[Parameter], num_layers: int, megatron: MegatronConfig, modules: Modules) -> Fp8Weights:
    """Return what FP8 changes of a rank's weights; the arguments are those of ``quantised``.

    Hopper multiplies FP8 matrices in one orientation only, and block scales differ by direction, so that a weight is
    held along its rows and along its columns: one byte an element each, under ``mxfp8`` with one more for 32. They are
    made at the first micro-batch of a pass and kept for the others. Under ``fp8_param`` the rows are the model's own
    weights, in the place of ``policy.precision``'s.
    """
    elements, primary = quantised(parameters, num_layers, megatron, modules), megatron.fp8_cfg.fp8_param
    of_one = 1 + 1 / 32 if modules.fp8 == "mxfp8" else 1
    return Fp8Weights(saved=elements if primary else 0, copies=round((1 if primary else 2) * of_one * elements))
