# SPDX-License-Identifier: Apache-2.0
"""Claim: the Dockerfile replaces nothing that NVIDIA compiled, and installs nothing at a version that moves.

It was not built; these are the mistakes that reading can find.
"""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_g2rpo.commands.doctor.lock import read_lock

ROOT = Path(__file__).parents[2]
DOCKERFILE, GUIDE, SCRIPT = ROOT / "Dockerfile", ROOT / "docs" / "install-gpu.md", ROOT / "docker" / "requirements.py"
# What NVIDIA's image has and pip would replace, had it its way.
HELD = """\
torch==2.13.0a0+9186a08b2c.nv26.07
numpy==2.1.0
transformer_engine==2.17.0+aabbccd
apex==0.1
nvidia-cudnn-frontend==1.29.0
"""


def commands(text: str) -> list[list[str]]:
    """Words of every ``pip install`` of a text, continued lines joined."""
    joined = text.replace("\\\n", " ")
    found = re.findall(r"pip install((?: [^&|\n`]+)+)", joined)
    return [shlex.split(words, comments=False) for words in found]


def faults(text: str) -> list[str]:
    """What is wrong with the ``pip install`` commands of a text."""
    found = []
    for words in commands(text):
        line = "pip install " + " ".join(words)
        constrained = "-c" in words or "--no-deps" in words
        names = [word for word in words if not word.startswith("-")]
        if any(re.match(r"(apex|flash[-_]attn)\b", name) for name in names):
            found.append(f"{line}: apex and flash-attn are not installed from PyPI")
        if any(re.fullmatch(r"torch|torch(>|<|~|!)\S*", name) for name in names):
            found.append(f"{line}: torch without its version")
        if not constrained:
            found.append(f"{line}: neither constraints nor --no-deps")
        if "transformer-engine-torch" in line and "--no-build-isolation" not in words:
            found.append(f"{line}: would be built against another torch")
        if any(name.startswith(("-e", ".")) for name in names) and "--no-build-isolation" not in words:
            found.append(f"{line}: would fetch build tools of any version")
    return found


@pytest.mark.parametrize("file", [DOCKERFILE, GUIDE], ids=lambda file: file.name)
def test_nothing_is_installed_loosely(file: Path) -> None:
    text = file.read_text().replace("**`pip install apex` is a mistake.**", "")
    assert len(commands(text)) >= 3
    assert faults(text) == []


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("RUN pip install -c c.txt apex", "apex"),
        ("RUN pip install -c c.txt flash-attn==2.8.3", "flash-attn"),
        ("RUN pip install -c c.txt torch vllm", "torch without"),
        ("RUN pip install -c c.txt 'torch>=2.13'", "torch without"),
        ("RUN pip install transformers==5.19.0", "neither"),
        ("RUN pip install --no-deps \\\n    transformer-engine-torch==2.20.2", "another torch"),
        ("RUN pip install -c c.txt -e .", "build tools"),
    ],
)
def test_a_loose_install_is_noticed(line: str, fault: str) -> None:
    assert fault in " ".join(faults(line))


def test_versions_in_the_commands_are_those_of_the_lock() -> None:
    pins = read_lock(ROOT / "constraints" / "gpu.txt")
    for file in (DOCKERFILE, GUIDE):
        written = re.findall(r"([a-z][a-z-]+)(?:\[\w+\])?==([0-9][\w.]*\w)", file.read_text())
        assert {"torch", "vllm", "transformer-engine", "transformer-engine-torch"} <= {name for name, _ in written}
        assert [(name, version) for name, version in written if pins[name] != version] == []


def test_both_images_stand_on_one_tag_and_say_that_they_were_not_built() -> None:
    text = DOCKERFILE.read_text()
    bases = re.findall(r"^FROM (\S+)(?: AS (\w+))?$", text, re.MULTILINE)
    assert bases == [("nvcr.io/nvidia/pytorch:26.07-py3", "base"), ("base", "image"), ("base", "locked")]
    assert "NEITHER WAS BUILT" in text
    assert "None of this has been installed or run on a GPU" in GUIDE.read_text()
    assert bases[0][0] in GUIDE.read_text()


def test_what_the_guide_says_of_the_lock_is_so() -> None:
    pins, text = read_lock(ROOT / "constraints" / "gpu.txt"), GUIDE.read_text()
    cudnn, nccl = pins["nvidia-cudnn-cu13"], pins["nvidia-nccl-cu13"]
    assert f"| {'.'.join(cudnn.split('.')[:2])}, {nccl} |" in text
    for name, shown in (("torch", "torch"), ("megatron-core", "megatron-core"), ("transformers", "transformers")):
        assert f"{shown} {pins[name]}" in text.replace("\n", " ")


def test_what_is_added_to_nvidias_image_leaves_what_it_holds() -> None:
    requirements = runpy.run_path(str(SCRIPT))["requirements"]
    pyproject, lock = (ROOT / "pyproject.toml").read_text(), (ROOT / "constraints" / "gpu.txt").read_text()
    added = requirements(pyproject, lock, HELD)
    names = {each.partition("==")[0] for each in added}
    assert not names & {"torch", "numpy", "transformer-engine", "apex", "vllm"}
    assert names >= {"megatron-core", "transformers", "pydantic", "omegaconf", "matplotlib", "pybind11"}
    pins = read_lock(ROOT / "constraints" / "gpu.txt")
    assert added == [f"{name}=={pins[name]}" for name in (each.partition("==")[0] for each in added)]
    # A numpy that the image did not hold would come from the lock.
    assert f"numpy=={pins['numpy']}" in requirements(pyproject, lock, "torch==2.13.0a0")


def test_the_script_prints_what_pip_reads(tmp_path: Path) -> None:
    held = tmp_path / "held.txt"
    held.write_text(HELD)
    done = subprocess.run([sys.executable, str(SCRIPT), str(held)], capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) > 15
    assert all(re.fullmatch(r"[a-z0-9-]+==\S+", line) for line in done.stdout.splitlines())
