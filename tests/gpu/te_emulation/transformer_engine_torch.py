"""Executed by TE as its extension module: every name of the real one exists, the emulated ones work, the others say so.

`calls` counts each emulated call; a name the real extension does not have raises AttributeError, as it would there.
"""
import collections, functools, importlib, pathlib, sys

import tests.gpu.te_emulation.enums as _enums

calls = collections.Counter()
_names = set(pathlib.Path(__file__).with_name("pybind_names.txt").read_text().split())


def _missing(name):
    def call(*a, **k):
        raise NotImplementedError(f"transformer_engine_torch.{name} is not emulated")
    call.__name__ = name; call.emulated = False
    return call


def _counted(name, f):
    @functools.wraps(f)
    def call(*a, **k):
        calls[name] += 1
        return f(*a, **k)
    call.emulated = True
    return call


for _n, _v in vars(_enums).items():
    if isinstance(_v, type) and not _n.startswith("_"): globals()[_n] = _v
for _n in _names: globals()[_n] = _missing(_n)
for _part in ("fp8", "gemm", "norm", "attention", "cp", "optim", "softmax", "misc"):
    _m = importlib.import_module("tests.gpu.te_emulation." + _part)
    for _n in _m.EXPORT:
        assert _n in _names, _n
        globals()[_n] = _counted(_n, getattr(_m, _n))
import types as _types
grouped_mlp_experimental = _types.SimpleNamespace(swizzle_scales_and_pack_ptrs_for_discrete_weights=_missing("grouped_mlp_experimental"))
__all__ = [n for n in globals() if not n.startswith("_")]
