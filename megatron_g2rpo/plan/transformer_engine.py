# SPDX-License-Identifier: Apache-2.0
"""Bytes that autograd keeps of a layer that is made of Transformer Engine's modules.

Read in Transformer Engine 2.20.2 (``module/layernorm_linear.py``, ``module/linear.py``, ``attention/``) and
megatron-core 0.16.1: what each module saves for its backward pass, each storage once. Nothing of it was measured on a
GPU. The letters are those of ``plan.sizes``.
"""

from __future__ import annotations

from megatron_g2rpo.plan.sizes import FP32, LOCAL, Sizes
from megatron_g2rpo.plan.slots import Slots

# Bytes of an FP8 operand's element, its share of a scale included: one float32 for 128 values, or one byte for 32.
_OPERAND = {"tensorwise": 1.0, "delayed": 1.0, "blockwise": 1 + FP32 / 128, "mxfp8": 1 + 1 / 32}
# cuBLAS is handed 32 MiB on Hopper and later (``get_cublas_workspace_size_bytes``).
CUBLAS_WORKSPACE = 33_554_432


def operand(size: Sizes, elements: int) -> int:
    """Return the bytes of a linear's input as it is kept for the weight's gradient: in FP8 its quantised columns."""
    fp8 = size.modules.fp8
    return size.nbytes * elements if fp8 is None else round(_OPERAND[fp8] * elements)


def normalised_input(size: Sizes) -> int:
    """Return the bytes kept of a norm and the projection that it is fused with: input, a root each, and operand."""
    elements = size.shared * size.hidden
    return size.nbytes * elements + FP32 * size.shared + operand(size, elements)


def attention(size: Sizes, core: int) -> int:
    """Return the bytes kept of norm, projections, head norms, rotary embedding and core attention of one layer.

    Args:
        size: the rank's sizes of the language model.
        core: bytes kept of the core attention, its inputs included.
    """
    e, head = size.nbytes, size.head_dim
    kept = normalised_input(size) + core
    if size.modules.head_norms:  # a copy of their input, a root
        kept += size.tokens * (size.heads + size.groups) * (e * head + FP32)
    if not size.modules.fused_rope:
        kept += 4 * e * size.tokens * head  # cosines and sines, made once for queries and once for keys
    outputs = size.tokens * size.heads * head
    if size.modules.fp8 is None and size.modules.attention != LOCAL:
        return kept + e * outputs  # the output projection keeps the very tensor that the core attention does, if it can
    return kept + operand(size, outputs)


def core_attention(size: Sizes, slots: Slots, *, selective: bool) -> int:
    """Return the bytes kept of Transformer Engine's attention on packed rows, without its outputs.

    It keeps queries, keys, values and a float32 log-sum-exp of each query and head; recomputed, only the row's own
    queries, keys and values. The outputs are the next projection's input, in whose dtype ``attention`` counts them; in
    FP8, and where a row has branches, they are kept beside it: the branches' queries are looked up, with the keys of
    their trunk for each of them, and the outputs copied to their places.
    """
    row = size.nbytes * size.tokens * (size.heads + 2 * size.groups) * size.head_dim
    if selective:
        return row
    heads, keys = size.heads * size.head_dim, 2 * size.groups * size.head_dim
    inputs = size.nbytes * (slots.queries * heads + slots.keys * keys)
    outputs = size.nbytes * slots.queries * heads if slots.copied or size.modules.fp8 is not None else 0
    return inputs + outputs + FP32 * slots.queries * size.heads


def mlp(size: Sizes) -> int:
    """Return the bytes kept of the norm, both projections and the gated activation.

    Gate and up projection; where the activation is not fused, the activated gate and the sum ``up + 0``; the operand of
    the second projection.
    """
    wide = size.tokens * size.features
    activation = (2 if size.modules.fused_activation else 4) * size.nbytes * wide
    return normalised_input(size) + activation + operand(size, wide)
