# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for Slurm's commands, and a way to run a batch script with them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "examples/recipes/vlm_g2rpo-quickstart-1n1g-megatron-tp1.yaml"
SFT_RECIPE = "examples/recipes/vlm_sft-quickstart-1n1g-megatron-tp1.yaml"
JOB = {
    "SLURM_JOB_ID": "123456",
    "SLURM_JOB_NAME": "g2rpo",
    "SLURM_NNODES": "2",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_GPUS_ON_NODE": "8",
}
PORT = 20000 + 123456 % 12000
# Whatever the caller's shell or a job around the tests has set would change what the scripts do.
_OF_SCRIPTS = (
    *(
        "SLURM",
        "SBATCH",
        "MASTER",
        "SRUN",
        "SERVER",
        "CONTAINER",
        "STAGE",
        "CHAIN",
        "REQUEUE",
        "LOGS",
        "NPROC",
        "DRYRUN",
    ),
)


@dataclass(frozen=True)
class Stubs:
    """A folder of stand-ins.

    Attributes:
        folder: comes first in the scripts' PATH.
        records: where they write what they were called with.
    """

    folder: Path
    records: Path

    def write(self, name: str, body: str) -> None:
        """Make a command of this name, in bash."""
        path = self.folder / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)

    def launched(self) -> list[str]:
        """Return the arguments of the last srun."""
        return (self.records / "srun.args").read_text().split("\0")[:-1]

    def environment(self, **variables: str) -> dict[str, str]:
        """Return what a script is run with."""
        clean = {key: value for key, value in os.environ.items() if not key.startswith(_OF_SCRIPTS)}
        return {**clean, "PATH": f"{self.folder}:{clean['PATH']}", "PYTHON": sys.executable, **variables}


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def stubs(tmp_path: Path) -> Stubs:
    """A `srun` that records its arguments, a `scontrol` that knows two hosts, a `squeue` that knows no time limit."""
    made = Stubs(tmp_path / "stubs", tmp_path)
    made.folder.mkdir()
    made.write("srun", f"printf '%s\\0' \"$@\" > '{tmp_path}/srun.args'\npwd > '{tmp_path}/srun.cwd'")
    made.write("scontrol", "[ \"$*\" = 'show hostnames gpu[07-08]' ] || exit 1\nprintf 'gpu07\\ngpu08\\n'")
    made.write("squeue", "echo N/A")
    return made


@pytest.fixture
def run(stubs: Stubs) -> Run:
    """``run(script, *arguments, **variables)``, from the repository."""

    def call(script: str | Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(ROOT / "slurm" / script), *arguments],
            cwd=ROOT,
            env=stubs.environment(**variables),
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return call
