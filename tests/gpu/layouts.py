# SPDX-License-Identifier: Apache-2.0
"""The parity matrix on a GPU: which layouts, on which layers, at which world size; see ``tests.parallel.layouts``.

Local layers are exact in float32 at every layout. Those of Transformer Engine are in float32 where its attention is (no
row may have padding), and in bfloat16 everywhere else. ``fast`` is what `make test-gpu` runs.
"""

from __future__ import annotations

from functools import partial

from tests.common.layout_parity import Case

Local = partial(Case, impl="local")
Engine = partial(Case, impl="transformer_engine", precision="bfloat16")
Exact = partial(Case, impl="transformer_engine", precision="float32")

WORLDS: dict[str, tuple[int, list[Case]]] = {
    # Without Transformer Engine: torch's AdamW, megatron-core's own gradient norm.
    "local-fast-1": (1, [Local(shape="tied"), Local(shape="wide", distributed_optimizer=True)]),
    "local-fast-2": (
        2,
        [
            Local(tensor=2, shape="untied"),
            Local(tensor=2, sequence_parallel=True, distributed_optimizer=True, shape="one_kv_head", overlap=True),
            Local(pipeline=2, shape="tied"),
            Local(context=2, shape="wide", distributed_optimizer=True),
            Local(shape="tied", overlap=True),
        ],
    ),
    "engine-fast-1": (
        1,
        [
            Exact(shape="tied"),
            Exact(shape="one_kv_head", distributed_optimizer=True, overlap=True),
            Engine(shape="wide"),
            Engine(shape="untied", recompute=("full", "uniform", 1)),
            Local(shape="tied"),  # with Transformer Engine's optimizer and gradient norm
        ],
    ),
    "engine-fast-2": (
        2,
        [
            Exact(tensor=2, shape="untied"),
            Exact(pipeline=2, shape="tied", stages=(3, 1), distributed_optimizer=True),
            Engine(tensor=2, shape="one_kv_head", overlap=True),
            Engine(tensor=2, sequence_parallel=True, shape="tied", distributed_optimizer=True),
            Engine(tensor=2, sequence_parallel=True, shape="untied", recompute=("full", "block", 1)),
            Engine(pipeline=2, shape="tied", recompute=("selective",)),
            Engine(context=2, shape="tied", distributed_optimizer=True, overlap=True),
            Engine(context=2, shape="untied", cp_comm="all_gather"),
            Engine(context=2, shape="wide", cp_comm="a2a"),
            Engine(shape="tied", distributed_optimizer=True, overlap=True),
        ],
    ),
    "engine-fast-4": (
        4,
        [
            Engine(tensor=2, context=2, sequence_parallel=True, shape="untied", cp_comm="a2a"),
            Engine(tensor=2, context=2, sequence_parallel=True, shape="tied", distributed_optimizer=True, overlap=True),
            Engine(tensor=2, pipeline=2, sequence_parallel=True, shape="tied", recompute=("full", "uniform", 1)),
            Engine(pipeline=2, context=2, shape="untied", stages=(2, None), cp_comm="all_gather"),
        ],
    ),
    "engine-fused-fast-1": (
        1,
        [
            Exact(shape="tied", fusions=("gradient_accumulation_fusion",)),
            Exact(shape="untied", fusions=("bias_activation_fusion",)),
            Engine(shape="wide", fusions=("gradient_accumulation_fusion", "bias_activation_fusion")),
            Local(shape="untied", fusions=("gradient_accumulation_fusion",), overlap=True),
        ],
    ),
    # What Transformer Engine's rotation computes in float32, megatron-core's own does in the precision of the weights.
    "engine-rope-fast-1": (
        1,
        [
            Exact(shape="tied", fusions=("apply_rope_fusion",)),
            Engine(shape="untied", fusions=("apply_rope_fusion",)),
        ],
    ),
    "engine-rope-full-2": (
        2,
        [
            Engine(context=2, shape="tied", fusions=("apply_rope_fusion",)),
            Engine(tensor=2, sequence_parallel=True, shape="tied", fusions=("apply_rope_fusion",)),
        ],
    ),
    "engine-full-4": (
        4,
        [
            Engine(tensor=4, sequence_parallel=True, shape="tied", distributed_optimizer=True, overlap=True),
            Engine(pipeline=4, shape="deep", stages=(3, 1), recompute=("full", "uniform", 1)),
            Engine(context=4, shape="tied", distributed_optimizer=True),
            Engine(context=4, shape="untied", cp_comm="all_gather", recompute=("full", "block", 1)),
            Engine(context=4, shape="untied", cp_comm="a2a", overlap=True),
            Engine(tensor=2, context=2, sequence_parallel=True, shape="wide", recompute=("selective",)),
            Engine(tensor=2, pipeline=2, sequence_parallel=True, shape="one_kv_head", distributed_optimizer=True),
        ],
    ),
    "engine-full-8": (
        8,
        [
            Engine(
                tensor=2,
                pipeline=2,
                context=2,
                sequence_parallel=True,
                shape="untied",
                stages=(2, 1),
                cp_comm="a2a",
                recompute=("full", "uniform", 1),
                distributed_optimizer=True,
                overlap=True,
            ),
            Engine(tensor=2, pipeline=2, context=2, sequence_parallel=True, shape="tied", cp_comm="all_gather"),
            Engine(tensor=2, pipeline=2, sequence_parallel=True, shape="tied", overlap=True),
            Engine(pipeline=2, context=4, shape="tied", distributed_optimizer=True, overlap=True),
        ],
    ),
}
