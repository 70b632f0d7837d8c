# SPDX-License-Identifier: Apache-2.0
"""The emulation of transformer_engine_torch offers what the real extension offers: names, arguments, enums.

What the real one offers was read from the sources of its release (``te_emulation/names.py``), so none of this needs
them.
"""

from __future__ import annotations

import inspect
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.devices import needs_transformer_engine, needs_virtual
from tests.gpu.te_emulation import names

pytestmark = [needs_virtual, needs_transformer_engine]

EXTENSION: dict[str, Any] = json.loads((Path(names.__file__).with_name("extension_2_20_2.json")).read_text())
FUNCTIONS: dict[str, dict[str, Any]] = EXTENSION["functions"]


@pytest.fixture(scope="module")
def tex() -> Any:
    import transformer_engine.pytorch  # noqa: F401  (it loads the extension)
    import transformer_engine_torch

    return transformer_engine_torch


def emulated(tex: Any) -> dict[str, Any]:
    return {name: getattr(tex, name) for name in FUNCTIONS if getattr(tex, name).emulated}


def test_the_release_whose_names_are_vendored_is_the_one_that_is_installed() -> None:
    from importlib.metadata import version

    assert version("transformer_engine") == "2.20.2"


def test_every_name_of_the_extension_exists_and_none_that_it_has_not(tex: Any) -> None:
    real = {*FUNCTIONS, *EXTENSION["enums"], *EXTENSION["classes"], *EXTENSION["submodules"]}
    assert {name for name in vars(tex) if not name.startswith("_")} - {"calls"} == real
    with pytest.raises(AttributeError):
        tex.fused_layernorm  # noqa: B018


def test_an_emulated_function_takes_the_arguments_of_the_real_one(tex: Any) -> None:
    """Names count where pybind registers them; else only how many there are, as callers pass them by position."""
    for name, function in emulated(tex).items():
        real = FUNCTIONS[name]
        ours = inspect.signature(function).parameters
        assert len(ours) == len(real["arguments"]), name
        if real["by_keyword"]:
            assert list(ours) == real["arguments"], name
            optional = [each for each, parameter in ours.items() if parameter.default is not parameter.empty]
            assert optional == real["optional"], name
            keyword_only = [each for each, parameter in ours.items() if parameter.kind is parameter.KEYWORD_ONLY]
            assert keyword_only == real["keyword_only"], name
        else:
            assert all(parameter.default is parameter.empty for parameter in ours.values()), name


def test_a_function_without_registered_names_refuses_keywords_as_pybind_does(tex: Any) -> None:
    with pytest.raises(TypeError, match=r"multi_tensor_l2norm.*by position"):
        tex.multi_tensor_l2norm(chunk_size=1, noop_flag=None, tensor_lists=[[]], per_tensor_python=None)


def test_what_is_not_emulated_says_its_name(tex: Any) -> None:
    missing = set(FUNCTIONS) - set(emulated(tex))
    assert len(missing) > 100
    for name in sorted(missing):
        with pytest.raises(NotImplementedError, match=rf"transformer_engine_torch\.{name} is not emulated"):
            getattr(tex, name)()
    with pytest.raises(NotImplementedError, match=r"grouped_mlp_experimental\.swizzle"):
        tex.grouped_mlp_experimental.swizzle_scales_and_pack_ptrs_for_discrete_weights()


def test_each_emulated_function_is_used_by_transformer_engine_or_megatron_core(tex: Any) -> None:
    """Nothing is emulated that no caller has: such code would be exercised by its own test only."""
    import megatron.core
    import transformer_engine

    roots = [Path(package.__path__[0]) for package in (transformer_engine, megatron.core)]
    sources = "\n".join(path.read_text() for root in roots for path in root.rglob("*.py"))
    assert [name for name in emulated(tex) if name not in sources] == []


def test_calls_are_counted_by_name(tex: Any) -> None:
    before = tex.calls["get_cudnn_version"]
    tex.get_cudnn_version()
    assert tex.calls["get_cudnn_version"] == before + 1


def test_enums_have_the_members_and_values_of_the_headers(tex: Any) -> None:
    for name, members in EXTENSION["enums"].items():
        ours = getattr(tex, name).__members__
        assert {key: int(member) for key, member in ours.items()} == members, name


def test_enums_equal_transformer_engines_python_mirrors(tex: Any) -> None:
    from transformer_engine.pytorch import constants
    from transformer_engine.pytorch.cpp_extensions import fused_attn

    assert {member.name: int(member) for member in constants.DType} == EXTENSION["enums"]["DType"]
    backends = EXTENSION["enums"]["NVTE_Fused_Attn_Backend"]
    assert {f"NVTE_{member.name}": int(member) for member in fused_attn.FusedAttnBackend} == backends
    by_name = {
        "NVTE_QKV_Layout": fused_attn.QKVLayout,
        "NVTE_QKV_Format": fused_attn.QKVFormat,
        "NVTE_Bias_Type": fused_attn.AttnBiasType,
    }
    for enum, mirror in by_name.items():
        members = getattr(tex, enum).__members__
        assert {name: members[f"NVTE_{name}"] for name in map(_upper, mirror)} == {
            _upper(name): member for name, member in mirror.items()
        }


def _upper(name: str | None) -> str:
    """Return the extension's spelling of a name of Python's."""
    return "QKV_Format_NOT_SET" if name is None else name.upper().replace("PAGED_KV", "Paged_KV")


def test_members_behave_as_pybind11s_do(tex: Any) -> None:
    assert tex.DType.kBFloat16 == 6, "DType alone compares with numbers"
    assert tex.NVTE_Mask_Type.NVTE_NO_MASK != 0
    assert tex.NVTE_Mask_Type.NVTE_NO_MASK != tex.NVTE_Bias_Type.NVTE_NO_BIAS
    assert tex.DType(7) == tex.DType.kFloat8E4M3
    assert pickle.loads(pickle.dumps(tex.NVTE_QKV_Format.NVTE_THD)) == tex.NVTE_QKV_Format.NVTE_THD
    with pytest.raises(ValueError, match="99 is not a value of DType"):
        tex.DType(99)


def test_the_vendored_names_are_what_the_script_reads() -> None:
    """On C++ in the manner of the real sources: each kind of registration, and what must not be taken for one."""
    sources = {
        "x/csrc/extensions/pybind.cpp": """
            // m.def("commented", &commented);
            m.def("named", space::named, "Doc, with a comma", py::arg("a"), py::arg("b") = f(1, 2), py::kw_only(),
                  py::arg("out"), py::call_guard<guard>());
            m.def("by_position", &space::by_position_cuda, "Doc");
            #ifdef NVTE_WITH_NCCL_EP
            m.def("elsewhere", &elsewhere);
            #endif
            pybind11::enum_<Kind>(m, "Kind", pybind11::module_local())
                .value("ONE", Kind::ONE)
                .value("NONE", Kind::NONE);
            auto sub = m.def_submodule("sub", "Doc");
            sub.def("inner", &inner, py::arg("x"));
            py::class_<space::Box, std::shared_ptr<space::Box>>(m, "Box").def(py::init<>());
        """,
        "x/csrc/extensions.h": """
            std::vector<py::object> by_position_cuda(const at::Tensor &input, std::optional<at::Tensor> out,
                                                     const int rank);
            enum class Kind { NONE = -1, /* a comment */ ONE = 1, TWO };
        """,
    }
    found = names.extension(sources)
    assert found == {
        "functions": {
            "named": {"arguments": ["a", "b", "out"], "by_keyword": True, "keyword_only": ["out"], "optional": ["b"]},
            "by_position": {
                "arguments": ["input", "out", "rank"],
                "by_keyword": False,
                "keyword_only": [],
                "optional": [],
            },
        },
        "enums": {"Kind": {"ONE": 1, "NONE": -1}},
        "classes": ["Box"],
        "submodules": {"sub": ["inner"]},
    }
