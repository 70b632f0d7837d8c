# SPDX-License-Identifier: Apache-2.0
"""Builds the virtual device's library, and says what a process needs to see it. Imports no torch itself."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
HEADERS = sorted(HERE.glob("*.h"))
SOURCES = sorted(HERE.glob("*.cpp"))
FLAGS = ["-O1", "-std=c++20", "-fPIC", "-DTORCH_EXTENSION_NAME=_virtual_cuda", "-DUSE_DISTRIBUTED"]


def _hash(*files: Path) -> str:
    contents = b"".join(file.read_bytes() for file in files)
    return hashlib.sha256(contents + " ".join(FLAGS).encode()).hexdigest()[:16]


# In the environment of the interpreter, against whose torch it is built, and by the contents of its sources.
FOLDER = Path(sys.prefix) / "virtual_cuda" / _hash(*HEADERS, *SOURCES)
LIBRARY = FOLDER / "_virtual_cuda.so"


def build() -> None:
    """Compile the library, a few minutes of one core, unless it is there; a source that has not changed is kept."""
    if LIBRARY.exists():
        return
    spec = find_spec("torch")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"torch is not installed in {sys.prefix}, so nothing can be built against it")
    torch = Path(spec.origin).resolve().parent  # an environment that is reached by a link may lose it
    FOLDER.mkdir(parents=True, exist_ok=True)
    _write(FOLDER / "takes_numbers.inc", _takes_numbers(torch))
    includes = [
        torch / "include",
        torch / "include/torch/csrc/api/include",
        sysconfig.get_path("include"),
        HERE,
        FOLDER,
    ]
    objects = []
    for source in SOURCES:
        target = FOLDER.parent / f"{source.stem}-{_hash(*HEADERS, source)}.o"
        if not target.exists():
            _run(target, ["g++", "-Wno-attributes", *FLAGS, "-c", str(source), *(f"-I{folder}" for folder in includes)])
        objects.append(str(target))
    library = torch / "lib"
    libraries = ["-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python", f"-Wl,-rpath,{library}"]
    _run(LIBRARY, ["g++", "-shared", *objects, f"-L{library}", *libraries])


def environment(*, transformer_engine: bool) -> dict[str, str]:
    """Return the variables by which Python processes use the virtual GPU, with or without Transformer Engine."""
    path = [str(ROOT / "tests" / "gpu" / "site"), str(FOLDER), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        "VIRTUAL_CUDA": "1",
        "VIRTUAL_TE": str(int(transformer_engine)),
        "PYTHONPATH": os.pathsep.join(folder for folder in path if folder),
    }


def _takes_numbers(torch: Path) -> str:
    """Name the operators, as C++ strings, that CUDA's dispatch does not check for devices: TensorIterator does."""
    declared = (torch.parent / "torchgen/packaged/ATen/native/native_functions.yaml").read_text()
    operators = re.findall(r"^- func: ([\w.]+)\((.*?)(?=^- func: |\Z)", declared, flags=re.MULTILINE | re.DOTALL)
    return "".join(f'"{name}",\n' for name, rest in operators if "device_check: NoCheck" in rest)


def _run(target: Path, command: list[str]) -> None:
    """Make a file by a compiler's command; two builders at once do not see each other's half-written ones."""
    unfinished = target.with_name(f"{target.name}.{os.getpid()}")
    subprocess.run([*command, "-o", str(unfinished)], check=True)
    unfinished.rename(target)


def _write(target: Path, text: str) -> None:
    unfinished = target.with_name(f"{target.name}.{os.getpid()}")
    unfinished.write_text(text)
    unfinished.rename(target)
