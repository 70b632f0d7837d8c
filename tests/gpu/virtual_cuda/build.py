# SPDX-License-Identifier: Apache-2.0
"""Builds the virtual device's library, and says what a process needs to see it. Imports no torch itself."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
SOURCE = Path(__file__).with_name("device.cpp")
# In the environment of the interpreter, whose torch it is built against, and by its source's contents.
FOLDER = Path(sys.prefix) / "virtual_cuda" / hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:16]
LIBRARY = FOLDER / "_virtual_cuda.so"


def build() -> None:
    """Compile the library, about a minute, unless it is there."""
    if LIBRARY.exists():
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    spec = find_spec("torch")
    assert spec is not None and spec.origin is not None, "torch is not installed"
    torch = Path(spec.origin).parent
    unfinished = LIBRARY.with_suffix(f".{os.getpid()}")
    includes = [torch / "include", torch / "include/torch/csrc/api/include", sysconfig.get_path("include")]
    subprocess.run(
        [
            *("g++", "-O1", "-std=c++20", "-shared", "-fPIC", "-DTORCH_EXTENSION_NAME=_virtual_cuda"),
            *("-DUSE_DISTRIBUTED", "-DUSE_C10D_GLOO", str(SOURCE), *(f"-I{folder}" for folder in includes)),
            *(f"-L{torch / 'lib'}", "-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python"),
            *(f"-Wl,-rpath,{torch / 'lib'}", "-o", str(unfinished)),
        ],
        check=True,
    )
    unfinished.rename(LIBRARY)


def environment(*, transformer_engine: bool) -> dict[str, str]:
    """Return the variables by which Python processes use the virtual GPU, with or without Transformer Engine."""
    path = [str(ROOT / "tests" / "gpu" / "site"), str(FOLDER), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        "VIRTUAL_CUDA": "1",
        "VIRTUAL_TE": str(int(transformer_engine)),
        "PYTHONPATH": os.pathsep.join(folder for folder in path if folder),
    }


