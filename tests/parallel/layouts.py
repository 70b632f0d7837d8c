# SPDX-License-Identifier: Apache-2.0
"""The parity matrix: which layouts, with which switches, on which models, at which world size.

``fast`` is part of `make test`: (tensor, pipeline, context, data) over {1, 2}^4 up to 8 ranks, every tensor-parallel
layout with and without sequence parallelism, every layout with and without the distributed optimizer; overlaps, tied
and untied embeddings, uneven stages and key/value head counts alternate. ``full`` widens it.
"""

from __future__ import annotations

from tests.common.layout_parity import Case

WORLDS: dict[str, tuple[int, list[Case]]] = {
    "fast-2": (
        2,
        [
            Case(tensor=2, shape="untied"),
            Case(tensor=2, sequence_parallel=True, distributed_optimizer=True, shape="tied"),
            Case(tensor=2, sequence_parallel=True, shape="one_kv_head", overlap=True),
            Case(pipeline=2, shape="tied"),
            Case(pipeline=2, shape="untied", distributed_optimizer=True, overlap=True, stages=(2, 1)),
            Case(context=2, shape="tied", overlap=True),
            Case(context=2, shape="wide", distributed_optimizer=True),
            Case(shape="untied", overlap=True),
            Case(shape="tied", distributed_optimizer=True, overlap=True),
        ],
    ),
    "fast-4": (
        4,
        [
            Case(tensor=2, pipeline=2, shape="one_kv_head"),
            Case(tensor=2, pipeline=2, sequence_parallel=True, distributed_optimizer=True, shape="tied", overlap=True),
            Case(tensor=2, context=2, shape="tied", distributed_optimizer=True),
            Case(tensor=2, context=2, sequence_parallel=True, shape="untied", overlap=True),
            Case(tensor=2, context=2, shape="tied", overlap=True, freeze_vision=True),
            Case(tensor=2, shape="wide", distributed_optimizer=True, overlap=True),
            Case(tensor=2, sequence_parallel=True, shape="tied"),
            Case(pipeline=2, context=2, shape="untied", stages=(2, None), overlap=True),
            Case(pipeline=2, context=2, distributed_optimizer=True, shape="tied", stages=(3, 1)),
            Case(pipeline=2, shape="tied", distributed_optimizer=True, overlap=True),
            Case(pipeline=2, shape="wide", stages=(None, 2)),
            Case(context=2, shape="tied"),
            Case(context=2, shape="untied", distributed_optimizer=True, overlap=True),
        ],
    ),
    "fast-8": (
        8,
        [
            Case(tensor=2, pipeline=2, context=2, shape="tied", distributed_optimizer=True, overlap=True),
            Case(tensor=2, pipeline=2, context=2, shape="untied", sequence_parallel=True, stages=(2, 1)),
            Case(tensor=2, pipeline=2, shape="untied", stages=(1, 2), distributed_optimizer=True),
            Case(tensor=2, pipeline=2, shape="tied", sequence_parallel=True, overlap=True),
            Case(tensor=2, context=2, shape="wide"),
            Case(tensor=2, context=2, sequence_parallel=True, distributed_optimizer=True, overlap=True, shape="tied"),
            Case(pipeline=2, context=2, shape="tied", overlap=True),
            Case(pipeline=2, context=2, shape="wide", distributed_optimizer=True, stages=(2, None)),
        ],
    ),
    "full-4": (
        4,
        [
            Case(tensor=4, shape="tied"),
            Case(tensor=4, sequence_parallel=True, shape="tied", distributed_optimizer=True, overlap=True),
            Case(tensor=4, sequence_parallel=True, shape="one_kv_head"),
            Case(tensor=4, sequence_parallel=True, shape="untied"),
            Case(pipeline=4, shape="deep"),
            Case(pipeline=4, shape="deep", stages=(3, 1), recompute=("full", "uniform", 1)),
            Case(pipeline=4, shape="wide", stages=(2, None), distributed_optimizer=True, overlap=True),
            Case(context=4, shape="tied"),
            Case(context=4, shape="untied", distributed_optimizer=True, overlap=True),
            Case(tensor=2, context=2, sequence_parallel=True, shape="tied", recompute=("selective",)),
            Case(tensor=2, pipeline=2, shape="tied", recompute=("full", "block", 1)),
            Case(tensor=2, sequence_parallel=True, shape="tied", recompute=("full", "uniform", 2), overlap=True),
            Case(pipeline=2, context=2, shape="untied", stages=(2, 1), recompute=("full", "uniform", 1)),
            Case(context=2, shape="wide", recompute=("full", "block", 3), distributed_optimizer=True, overlap=True),
        ],
    ),
    "full-8": (
        8,
        [
            Case(tensor=4, context=2, sequence_parallel=True, shape="tied", distributed_optimizer=True),
            Case(tensor=4, pipeline=2, sequence_parallel=True, shape="one_kv_head", overlap=True),
            Case(tensor=2, pipeline=4, sequence_parallel=True, shape="deep", stages=(3, 1), distributed_optimizer=True),
            Case(pipeline=4, context=2, shape="deep", overlap=True),
            Case(pipeline=2, context=4, shape="tied", distributed_optimizer=True, overlap=True),
            Case(tensor=2, context=4, sequence_parallel=True, shape="untied"),
            Case(
                tensor=2,
                pipeline=2,
                context=2,
                sequence_parallel=True,
                shape="tied",
                stages=(3, 1),
                recompute=("full", "uniform", 1),
                distributed_optimizer=True,
                overlap=True,
            ),
            Case(tensor=2, pipeline=2, context=2, sequence_parallel=True, shape="tied", precision="bfloat16"),
            Case(
                tensor=2,
                pipeline=2,
                context=2,
                sequence_parallel=True,
                shape="untied",
                stages=(2, 1),
                precision="bfloat16",
                distributed_optimizer=True,
                overlap=True,
            ),
        ],
    ),
}
