# SPDX-License-Identifier: Apache-2.0
"""A heterogeneous job on a real Slurm: vLLM serves on one node what is trained on the other."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.toy import ROOT, Toy, metrics
from tests.slurm.cluster import Cluster
from tests.slurm.on_cluster.conftest import Submit, output_of

pytestmark = [pytest.mark.full, pytest.mark.slurm, pytest.mark.timeout(1500)]

PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
STEPS = 2


def test_servers_are_started_awaited_keyed_and_stopped(
    trained: Toy, cluster: Cluster, submit: Submit, tmp_path: Path
) -> None:
    assert PYTHON.exists(), "vLLM has an environment of its own, which `make test-slurm` installs"
    recipe = trained.recipe(
        tmp_path / "recipe.yaml",
        grpo={"max_num_steps": STEPS, "val_at_start": False, "val_at_end": False},
        checkpointing={"export_hf": False},
        policy={"generation": {"vllm_cfg": {"kv_cache_memory_bytes": 2**26, "enforce_eager": True}}},
        logger={"log_dir": str(tmp_path / "run")},
        cluster={"gpus_per_node": 2},
    )
    job = submit("train_g2rpo_servers.sh", recipe, options=("--time=30",), PYTHON=str(PYTHON), SERVER_TIMEOUT="600")
    ended = cluster.wait(job, "COMPLETED", "FAILED", seconds=1200)
    said = output_of(tmp_path, job)
    logs = tmp_path / f"slurm-g2rpo-{job}"
    server = (logs / "server_0.log").read_text()
    assert ended["JobState"] == "COMPLETED", said + server[-4000:]
    assert "all servers answer" in said
    lines = metrics(tmp_path / "run")
    assert sorted(lines) == list(range(1, STEPS + 1))
    # The server drew the tokens, and with the key: without it only /health answers.
    assert 'POST /inference/v1/generate HTTP/1.1" 200' in server
    # What it served were the trainer's weights: its log-probabilities are the trainer's, in float32.
    assert all(line["train/rollout_gap_max"] < 1e-3 for line in lines.values())
    key = "MEGATRON_G2RPO_API_KEY="
    assert key not in said
    # Stopped with the job; the cluster's daemons alone are left.
    serving = [pid for pid in cluster.processes() if b"api_server" in command_of(pid)]
    assert serving == []


def command_of(pid: int) -> bytes:
    """A process's command line; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
