# SPDX-License-Identifier: Apache-2.0
"""slurm/train_g2rpo_servers.sh, convert.sh, eval.sh and attach.sh: the commands that they print and start.

Real servers in a real heterogeneous job: ``on_cluster``.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.conftest import JOB, PORT, RECIPE, ROOT, SFT_RECIPE, Run, Stubs

SERVERS = "train_g2rpo_servers.sh"
HET_JOB = {
    **JOB,
    "SLURM_HET_SIZE": "2",
    "SLURM_JOB_NUM_NODES_HET_GROUP_0": "1",
    "SLURM_JOB_NODELIST_HET_GROUP_0": "gpu07",
    "SLURM_JOB_NODELIST_HET_GROUP_1": "gpu[07-08]",
}


def test_servers_and_trainer_are_told_of_each_other(stubs: Stubs, run: Run) -> None:
    """Two servers on each of two nodes: four addresses, the same for all, and the trainer on its own component."""
    stubs.write("scontrol", 'case $3 in gpu07) echo gpu07 ;; "gpu[07-08]") printf "gpu07\\ngpu08\\n" ;; esac')
    result = run(SERVERS, RECIPE, "grpo.seed=3", DRYRUN="1", SERVERS_PER_NODE="2", SERVER_PORT="9000", **HET_JOB)
    assert result.returncode == 0, result.stderr
    _, export, key, serve, _, train = result.stdout.splitlines()
    assert shlex.split(export) == ["export", "MASTER_ADDR=gpu07", f"MASTER_PORT={PORT}"]
    assert key == "export MEGATRON_G2RPO_API_KEY=..."
    addresses = ", ".join(f"'http://{host}:{port}'" for host in ("gpu07", "gpu08") for port in (9000, 9001))
    engine = [
        *("grpo.seed=3", "policy.generation.backend=vllm_server"),
        f"policy.generation.vllm_server_cfg.addresses=[{addresses}]",
    ]
    logs = f"{ROOT}/slurm-g2rpo-123456"
    assert shlex.split(serve) == [
        *("srun", "--het-group=1", "--nodes=2", "--ntasks=4", "--ntasks-per-node=2", "--cpu-bind=none"),
        *("--kill-on-bad-exit=0", "--wait=0", "bash", "slurm/serve.sh", logs, "1", "9000"),
        *(sys.executable, "-m", "megatron_g2rpo.cli", "serve", RECIPE, *engine, "&"),
    ]
    assert shlex.split(train) == [
        *("srun", "--het-group=0", "--nodes=1", "--ntasks=8", "--ntasks-per-node=8", "--cpu-bind=none"),
        *("--kill-on-bad-exit=1", "--label", "bash", "slurm/rank.sh", logs),
        *(sys.executable, "-m", "megatron_g2rpo.cli", "train", RECIPE, *engine),
        *("cluster.num_nodes=1", "cluster.gpus_per_node=8"),
    ]


def test_a_dry_run_in_a_job_starts_as_many_servers_as_the_job(stubs: Stubs, run: Run) -> None:
    """It asks a node of the servers for its GPUs, as the job does; outside a job the recipe's are assumed, and said."""
    stubs.write("scontrol", "echo gpu07")
    stubs.write("srun", '[ "$*" = "--het-group=1 --nodes=1 --ntasks=1 printenv SLURM_GPUS_ON_NODE" ] && echo 8')
    overrides = ["policy.generation.vllm_cfg.tensor_parallel_size=2", "cluster.gpus_per_node=4"]
    inside = run(SERVERS, RECIPE, *overrides, DRYRUN="1", **HET_JOB)
    assert inside.returncode == 0, inside.stderr
    assert " --ntasks=4 --ntasks-per-node=4 " in inside.stdout.splitlines()[3]
    assert [f"http://gpu07:{port}" in inside.stdout for port in range(8001, 8006)] == [True] * 4 + [False]
    assert "assumed" not in inside.stdout
    outside = run(SERVERS, RECIPE, *overrides, DRYRUN="1").stdout.splitlines()
    assert outside[0].startswith("# assumed: one node of 4 GPUs for the servers (cluster.gpus_per_node)")
    assert " --ntasks=2 --ntasks-per-node=2 " in outside[4]


@pytest.mark.parametrize(
    ("recipe", "variables", "message"),
    [
        (SFT_RECIPE, {"SLURM_HET_SIZE": "2"}, "is for sft, which samples nothing; use slurm/train_g2rpo.sh"),
        (RECIPE, {}, "the job has 1 component(s), not the trainer's and the servers'"),
        (RECIPE, {"SLURM_HET_SIZE": "2", "CHAIN": "2"}, "CHAIN is for slurm/train_g2rpo.sh"),
    ],
)
def test_servers_are_refused_where_they_cannot_be(
    run: Run, recipe: str, variables: dict[str, str], message: str
) -> None:
    result = run(SERVERS, recipe, SERVERS_PER_NODE="1", **JOB, **variables)
    assert result.returncode == 2
    assert message in result.stderr


def test_servers_that_end_end_the_job(stubs: Stubs, run: Run) -> None:
    """At once, not after the time that they have to answer."""
    stubs.write("scontrol", "echo localhost")
    stubs.write("srun", "exit 0")
    variables = {**HET_JOB, "SERVERS_PER_NODE": "1", "SERVER_PORT": "1", "SERVER_TIMEOUT": "600"}
    result = run(SERVERS, RECIPE, **variables)
    assert result.returncode == 2
    assert "the servers have ended; see " in result.stderr


def test_a_server_takes_its_gpus_and_its_port_and_is_started_again(tmp_path: Path) -> None:
    """The second of a node's servers, of two GPUs each."""
    command = ["bash", "slurm/serve.sh", str(tmp_path), "2", "8001"]
    variables = {"SLURM_LOCALID": "1", "SLURM_PROCID": "5", "CUDA_VISIBLE_DEVICES": "0,1,2,3", "SERVER_RESTARTS": "1"}
    done = subprocess.run(
        [*command, "bash", "-c", 'echo "$CUDA_VISIBLE_DEVICES $*"; exit 7', "server"],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "SLURMD_NODENAME": "gpu08", **variables},
        check=False,
    )
    assert done.returncode == 1
    first, ended, *again = (tmp_path / "server_5.log").read_text().splitlines()
    assert first == "2,3 --host 0.0.0.0 --port 8002"
    assert ended.endswith("server 5 on gpu08:8002 ended with code 7")
    assert again[0] == first


def test_conversion_and_evaluation_use_a_nodes_gpus(stubs: Stubs, run: Run) -> None:
    for script, arguments in (("convert.sh", ["import", "a b", "out"]), ("eval.sh", [RECIPE, "--samples=4"])):
        verb = script.removesuffix(".sh")
        result = run(script, *arguments, **JOB)
        assert result.returncode == 0, result.stderr
        assert stubs.launched() == [
            *("--nodes=1", "--ntasks=1", "--cpu-bind=none"),
            *(sys.executable, "-m", "megatron_g2rpo.cli", verb, *arguments, "--nproc", "8"),
        ]
        assert "usage: sbatch" in run(script, **JOB).stderr
        dry = run(script, *arguments, DRYRUN="1").stdout.splitlines()
        assert dry[0].startswith("# assumed: no GPUs; a job adds --nproc")
        assert "--nproc" not in dry[2]
        assert run(script, *arguments, DRYRUN="1", NPROC="8").stdout.splitlines()[1].endswith(" --nproc 8 ")


def test_attach_finds_the_jobs_node_and_output(stubs: Stubs, run: Run) -> None:
    stubs.write("squeue", 'echo "gpu[07-08]"')
    stubs.write(
        "scontrol", 'case $2 in hostnames) printf "gpu07\\ngpu08\\n" ;; job) echo "   StdOut=/logs/1.out" ;; esac'
    )
    on = "srun --jobid=1 --overlap --nodes=1 --ntasks=1 --nodelist={} --cpu-bind=none {}"
    for arguments, command in (
        ([], on.format("gpu07", "--pty /bin/sh")),
        (["gpu08"], on.format("gpu08", "--pty /bin/sh")),
        (["-", "nvidia-smi", "-L"], on.format("gpu07", "nvidia-smi -L")),
        (["logs"], "tail -n 100 -F /logs/1.out"),
    ):
        assert run("attach.sh", "1", *arguments, DRYRUN="1", SHELL="/bin/sh").stdout.strip() == command
    stubs.write("squeue", "exit 1")
    assert "job 1 is not running" in run("attach.sh", "1", DRYRUN="1").stderr
    (stubs.folder / "squeue").unlink()
    for name in ("bash", "sed"):
        (stubs.folder / name).symlink_to(f"/usr/bin/{name}")
    assert "squeue is not found" in run("attach.sh", "1", PATH=str(stubs.folder)).stderr
