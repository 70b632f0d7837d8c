# SPDX-License-Identifier: Apache-2.0
"""What the module ``transformer_engine_torch`` consists of here.

Every function of the real extension exists. Those of ``_EMULATED`` work and are counted in ``calls``; the others raise
NotImplementedError with their name. What the real one does not have raises AttributeError, as it would there.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

from tests.gpu.te_emulation import (
    attention,
    context_parallel,
    enums,
    gemm,
    norm,
    optimizers,
    partial_casts,
    quantize,
    quantized_tensors,
    rope,
    scaling,
    softmax,
    versions,
)

# How often each emulated function was called in this process.
calls: Counter[str] = Counter()

_EXTENSION = json.loads((Path(enums.__file__).parent / "extension_2_20_2.json").read_text())
_EMULATED = (
    attention,
    context_parallel,
    gemm,
    norm,
    optimizers,
    partial_casts,
    quantize,
    quantized_tensors,
    rope,
    scaling,
    softmax,
    versions,
)


def _missing(name: str) -> Callable[..., Any]:
    def call(*arguments: Any, **keywords: Any) -> Any:
        raise NotImplementedError(f"transformer_engine_torch.{name} is not emulated")

    call.__name__ = name
    call.emulated = False
    return call


def _counting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    by_position = not _EXTENSION["functions"][name]["by_keyword"]

    @functools.wraps(function)
    def call(*arguments: Any, **keywords: Any) -> Any:
        if by_position and keywords:  # no names are registered, so pybind takes none
            raise TypeError(f"transformer_engine_torch.{name}() takes its arguments by position, got {[*keywords]}")
        calls[name] += 1
        return function(*arguments, **keywords)

    call.emulated = True
    return call


def _function(name: str) -> Callable[..., Any]:
    own = ((module.__name__, getattr(module, name, None)) for module in _EMULATED)
    found = next((each for module, each in own if isinstance(each, FunctionType) and each.__module__ == module), None)
    return _missing(name) if found is None else _counting(name, found)


def offered() -> dict[str, Any]:
    """Return every name of the extension with what it stands for."""
    functions, submodules = _EXTENSION["functions"], _EXTENSION["submodules"]
    return {
        **{name: getattr(enums, name) for name in (*_EXTENSION["enums"], *_EXTENSION["classes"])},
        **{name: _function(name) for name in functions},
        **{
            name: SimpleNamespace(**{each: _missing(f"{name}.{each}") for each in submodules[name]})
            for name in submodules
        },
    }
