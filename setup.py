# SPDX-License-Identifier: Apache-2.0
"""Build of the one compiled part, the group-statistics op of ``csrc/``. All metadata lives in pyproject.toml.

Without a C++17 compiler, install with ``MEGATRON_G2RPO_BUILD_EXT=0``: the torch implementation of the same functions
then takes over, and says so at import.
"""

import os
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup
from setuptools.errors import CCompilerError, ExecError

NO_EXTENSION = "MEGATRON_G2RPO_BUILD_EXT=0"


class BuildExt(build_ext):
    """Says what to do when the extension can't be compiled."""

    def build_extension(self, ext):
        try:
            super().build_extension(ext)
        except (CCompilerError, ExecError) as error:
            raise SystemExit(
                f"Could not compile {ext.name} ({error}). It needs a C++17 compiler (set CXX to choose one). To "
                f"install without it, on the slower torch implementation, set {NO_EXTENSION}."
            ) from error


def extensions() -> list[Pybind11Extension]:
    """Returns the extension, or none where the environment says so."""
    switch = os.environ.get("MEGATRON_G2RPO_BUILD_EXT", "1")
    if switch not in ("0", "1"):
        raise SystemExit(f"MEGATRON_G2RPO_BUILD_EXT must be 0 or 1, got {switch!r}")
    if switch == "0":
        return []
    return [
        Pybind11Extension(
            "megatron_g2rpo.objective._group_ops",
            ["csrc/binding.cpp", "csrc/vector_kernels.cpp"],
            depends=sorted(str(header) for header in Path("csrc").glob("*.hpp")),
            cxx_std=17,
            # No contraction into fused multiply-adds: it would let the target CPU decide the last bit of an advantage.
            extra_compile_args=["-O3", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off"],
        )
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExt})
