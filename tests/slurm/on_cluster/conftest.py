# SPDX-License-Identifier: Apache-2.0
"""A real Slurm cluster of two nodes, and a small policy; started once, and stopped whatever happens."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import warm_start
from tests.e2e.toy import Toy
from tests.slurm.cluster import Cluster, running

# From a job's submission to its end: two starts of four processes on two cores that something else may also use.
JOB_SECONDS = 420


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """The cluster; no process of it is left behind."""
    root = Path(tempfile.mkdtemp(prefix="g2rpo-slurm-"))  # a short path: munge's socket has one of at most 107 bytes
    root.chmod(0o755)  # munged refuses a socket that not everyone can reach
    try:
        with running(root / "cluster") as started:
            yield started
        assert started.processes() == []
    finally:
        shutil.rmtree(root)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    """The small data, and a policy whose rewards vary."""
    return warm_start(tmp_path_factory.mktemp("warm")).trained


Submit = Callable[..., str]


@pytest.fixture
def submit(cluster: Cluster, tmp_path: Path) -> Submit:
    """``submit(script, *arguments, options=..., python=..., **variables)``: the number of the job."""

    def sbatch(script: str, *arguments: str | Path, options: tuple[str, ...] = (), **variables: str) -> str:
        output = f"--output={tmp_path}/%x-%j.out"
        variables = {"PYTHON": sys.executable, "LOGS": str(tmp_path), "OMP_NUM_THREADS": "1", **variables}
        printed = cluster.text("sbatch", "--parsable", output, *options, f"slurm/{script}", *arguments, **variables)
        return printed.strip()

    return sbatch


def output_of(tmp_path: Path, job: str) -> str:
    """A job's merged output; empty as long as there is none."""
    files = list(tmp_path.glob(f"*-{job}.out"))
    return files[0].read_text() if files else ""
