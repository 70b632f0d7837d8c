# SPDX-License-Identifier: Apache-2.0
"""Makes ``import transformer_engine`` load our Python in the place of its compiled half.

Transformer Engine's own loading still runs: it resolves a path, executes it as its extension module and checks the
version of cuDNN. Only its two questions are answered: whether there is a core library (``NVTE_PROJECT_BUILDING`` skips
it), and where the extension is.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

_EXTENSION = Path(__file__).with_name("transformer_engine_torch.py")
_COMMON = "transformer_engine.common"


def load_emulation() -> None:
    """Have the next import of Transformer Engine in this process use the emulation."""
    sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _COMMON:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    def __init__(self, real: Any) -> None:
        self._real = real

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._real.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        import torch

        torch.version.cuda = "13.0"  # it compares the number with 12.9 for block scaling
        before = os.environ.get("NVTE_PROJECT_BUILDING")
        os.environ["NVTE_PROJECT_BUILDING"] = "1"  # no libtransformer_engine.so, cublas, cudnn and cudart to load
        try:
            self._real.exec_module(module)
        finally:
            if before is None:
                del os.environ["NVTE_PROJECT_BUILDING"]
            else:
                os.environ["NVTE_PROJECT_BUILDING"] = before
        find: Any = module._get_shared_object_file
        module._get_shared_object_file = lambda library: _EXTENSION if library == "torch" else find(library)
