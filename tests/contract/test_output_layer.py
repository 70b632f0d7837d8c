# SPDX-License-Identifier: Apache-2.0
"""Claim: what the log-probability output layer takes from ColumnParallelLinear is there, in every supported release.

Its base class is constructed through ``cls(...)``, which the reader of our calls cannot see.
"""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import megatron.core
import pytest

from megatron_g2rpo.policy import output_layer
from tests.contract.calls import LIBRARY, our_calls
from tests.contract.release import Release
from tests.contract.test_megatron_core import installed, misfits

BASE = f"{LIBRARY}.tensor_parallel.ColumnParallelLinear"
MAPPINGS = (
    f"{LIBRARY}.tensor_parallel.copy_to_tensor_model_parallel_region",
    f"{LIBRARY}.tensor_parallel.gather_from_sequence_parallel_region",
)
# Parameter -> whether it must be given; read from megatron_core-0.19.2's wheel by tests/contract/signatures.py.
NEWEST: dict[str, dict[str, bool]] = {
    BASE: {
        **dict.fromkeys(("config", "init_method", "input_size", "output_size"), True),
        **dict.fromkeys(
            (
                "bias",
                "disable_grad_reduce",
                "embedding_activation_buffer",
                "gather_output",
                "grad_output_buffer",
                "is_expert",
                "keep_master_weight_for_test",
                "name",
                "skip_bias_add",
                "skip_weight_param_allocation",
                "stride",
                "tp_comm_buffer_name",
                "tp_group",
            ),
            False,
        ),
    },
    MAPPINGS[0]: {"group": False, "input_": True},
    MAPPINGS[1]: {
        "group": False,
        "input_": True,
        "output_split_sizes": False,
        "tensor_parallel_output_grad": False,
        "use_global_buffer": False,
    },
}


def constructor_keywords() -> set[str]:
    """Keywords of the ``cls(...)`` call, from source."""
    calls = [
        node
        for node in ast.walk(ast.parse(inspect.getsource(output_layer)))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "cls"
    ]
    assert len(calls) == 1
    assert not calls[0].args
    return {keyword.arg for keyword in calls[0].keywords if keyword.arg is not None}


def passed() -> dict[str, set[str]]:
    calls = our_calls(Path(output_layer.__file__).parent)
    return {BASE: constructor_keywords(), **{name: calls[name].keywords for name in MAPPINGS}}


@pytest.mark.parametrize("name", [BASE, *MAPPINGS])
def test_what_we_pass_is_taken(name: str) -> None:
    assert "group" in passed()[name] or "tp_group" in passed()[name], "the comparison needs keywords"
    assert not misfits(passed()[name], installed(name))
    assert not misfits(passed()[name], NEWEST[name])


def test_the_base_class_keeps_its_weight_where_we_put_it() -> None:
    """`adopt` reads and sets these attributes of a ColumnParallelLinear; a release that renamed one would break it."""
    release = Release(Path(megatron.core.__file__).parents[2])
    module, node, _ = release._find(BASE)
    found = release._method(module, node, "__init__")
    assert found is not None
    assigned = {
        target.attr
        for statement in ast.walk(found[1])
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Attribute)
    }
    assert {"config", "input_size", "output_size", "output_size_per_partition", "sequence_parallel"} <= assigned
    assert {"tp_group", "weight"} <= assigned
