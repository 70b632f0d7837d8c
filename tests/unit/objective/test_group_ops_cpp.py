# SPDX-License-Identifier: Apache-2.0
"""The C++ unit test of the op: compiled with the flags of ``setup.py``, run, and run again as other builds.

The op's results must not depend on the CPU: its vectorised loops are compiled for several instruction sets, and the
test program prints a checksum of the bits of all that it computed.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[3] / "csrc"
TEST, KERNELS = CSRC / "tests" / "group_ops_test.cpp", CSRC / "vector_kernels.cpp"
FLAGS = ("-std=c++17", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off")
COMPILER = shlex.split(os.environ.get("CXX") or sysconfig.get_config_var("CXX") or "c++")  # as setuptools chooses it

pytestmark = pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason=f"no C++ compiler ({COMPILER[0]})")


def run(*command: str | Path) -> str:
    """Returns what a command prints; fails with it where the command does."""
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=240, check=False)
    assert result.returncode == 0, f"{shlex.join(result.args)}\n{result.stdout}{result.stderr}"
    return result.stdout


def compile_(source: Path, output: Path, *flags: str) -> Path:
    run(*COMPILER, *FLAGS, *flags, "-c", source, "-o", output)
    return output


@pytest.fixture(scope="module")
def program_object(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test program but for the vectorised loops, optimised as the extension is."""
    return compile_(TEST, tmp_path_factory.mktemp("cpp") / "test.o", "-O3")


def checksum(program_object: Path, folder: Path, *kernel_flags: str) -> str:
    """Builds the program with the vectorised loops compiled that way, and runs it."""
    kernels = compile_(KERNELS, folder / "kernels.o", "-O3", *kernel_flags)
    run(*COMPILER, program_object, kernels, "-o", folder / "test")
    match = re.fullmatch(r"checksum ([0-9a-f]{16})\n", run(folder / "test"))
    assert match is not None
    return match[1]


def cpu_flags() -> set[str]:
    info = Path("/proc/cpuinfo")
    return set(info.read_text().split()) if info.exists() else set()


def test_passes_and_computes_the_same_bits_as_without_wide_vectors(program_object: Path, tmp_path: Path) -> None:
    assert checksum(program_object, tmp_path) == checksum(program_object, tmp_path, "-DG2RPO_VECTOR_CLONES=")


@pytest.mark.full
@pytest.mark.parametrize("instructions", ["avx2", "avx512f"])
def test_computes_the_same_bits_on_every_instruction_set(
    program_object: Path, tmp_path: Path, instructions: str
) -> None:
    """Fused multiply-adds come with both; ``-ffp-contract=off`` must keep them out."""
    if instructions not in cpu_flags():
        pytest.skip(f"this CPU has no {instructions}")
    forced = checksum(program_object, tmp_path, f'-DG2RPO_VECTOR_CLONES=__attribute__((target("{instructions},fma")))')
    assert forced == checksum(program_object, tmp_path, "-DG2RPO_VECTOR_CLONES=")


@pytest.mark.full
def test_passes_under_the_sanitizers_of_addresses_and_undefined_behaviour(tmp_path: Path) -> None:
    """A stray read or write, a leak or an overflow ends the program with an error. -O1 keeps the stack readable."""
    sanitize = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    run(*COMPILER, *FLAGS, *sanitize, TEST, KERNELS, "-o", tmp_path / "test")
    assert run(tmp_path / "test").startswith("checksum ")
