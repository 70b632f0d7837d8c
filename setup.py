# SPDX-License-Identifier: Apache-2.0
"""Build of the one compiled part, the group-statistics op of ``csrc/``. All metadata lives in pyproject.toml.

The package works without it, on a slower torch implementation of the same functions. ``MEGATRON_G2RPO_BUILD_EXT`` says
what a missing C++17 compiler means: unset, the build goes on without the op and warns (pip shows that with ``-v`` only,
which is why every import warns, too); 1, the build fails; 0, the op is not built at all.
"""

import os
import sys
from pathlib import Path

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup
from setuptools.errors import CCompilerError, ExecError

SWITCH = "MEGATRON_G2RPO_BUILD_EXT"


class BuildExt(build_ext):
    """Says what to do when the extension can't be compiled."""

    def build_extension(self, ext):
        try:
            super().build_extension(ext)
        except (CCompilerError, ExecError) as error:
            failed = (
                f"Could not compile {ext.name} ({error}). It needs a C++17 compiler and Python's headers; CXX chooses "
                "the compiler."
            )
            if not ext.optional:
                raise SystemExit(f"{failed} To install without it, unset {SWITCH}.") from error
            frame = "=" * 80
            print(
                f"{frame}\nWARNING: {failed}\nThe package is installed WITHOUT it: advantages run on the slower torch "
                f"implementation. {SWITCH}=1 makes this an error, {SWITCH}=0 silences it.\n{frame}",
                file=sys.stderr,
            )


def extensions() -> list[Pybind11Extension]:
    """Returns the extension, or none where the environment says so."""
    switch = os.environ.get(SWITCH)
    if switch not in (None, "0", "1"):
        raise SystemExit(f"{SWITCH} must be 0, 1 or unset, got {switch!r}")
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
            optional=switch is None,  # setuptools then copies no file that was not built
        )
    ]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExt})
