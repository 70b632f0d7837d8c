# SPDX-License-Identifier: Apache-2.0
"""examples/nemo_run/launch.py: the job that nemo-run makes of a recipe, by its dry run, and what that job starts.

Needs nemo-run: `make test-nemo-run`. The batch script is run, with stand-ins for Slurm's commands and for Python; not
tested here: a real scheduler, containers, submission.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "examples" / "nemo_run" / "launch.py"
RECIPE = "examples/recipes/vlm_g2rpo-quickstart-1n1g-megatron-tp1.yaml"
# What a shell would split, expand or strip if one quote were missing.
HARD = ['data.system_prompt=it\'s a "test" of $HOME, `id` and *', "data.train.path='two  spaces'", "grpo.seed=3"]
SERVERS = "['http://gpu09:8001', 'http://gpu09:8002', 'http://gpu10:8001', 'http://gpu10:8002']"

SRUN = """
printf '%s\\0' "$@" >> '{tmp}/srun.args'; printf '\\n' >> '{tmp}/srun.args'
case " $* " in
  *" hostname "*) echo 127.0.0.1; exit ;;
esac
nodes=1 tasks=1
for argument; do
  case $argument in --nodes=*) nodes=${{argument#*=}} ;; --ntasks=*) tasks=${{argument#*=}} ;; esac
done
export SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_STEP_NUM_NODES=$nodes SLURM_STEP_NUM_TASKS=$tasks
# The program is what follows the last option: `bash SCRIPT`.
exec "${{@: -2}}"
"""
SCONTROL = """
case "$1 $2" in
  'requeue 77') echo requeued >> '{tmp}/requeue'; exit 1 ;;  # as if Slurm had not ended this script yet
esac
case "${{@: -1}}" in
  gpu*07-08*) printf 'gpu07\\ngpu08\\n' ;;
  *gpu*09-10*) printf 'gpu09\\ngpu10\\n' ;;
  *) exit 1 ;;
esac
"""
# The trainer and the servers: what they were started with, and how the trainer ends.
PYTHON = """
name=train
[ "$3" = serve ] && name=serve
printf '%s\\0' "$@" > '{tmp}/'$name.args
env > '{tmp}/'$name.env
if [ $name = serve ]; then
  for _ in $(seq 100); do [ -e '{tmp}/done' ] && exit; /bin/sleep 0.1; done
  exit 1
fi
: > '{tmp}/done'
exit "$TRAINER_CODE"
"""


@pytest.fixture
def stubs(tmp_path: Path) -> Path:
    folder = tmp_path / "stubs"
    folder.mkdir()
    commands = {
        "srun": SRUN,
        "scontrol": SCONTROL,
        "squeue": "echo RUNNING\n",
        "python": PYTHON,
        "curl": "printf '%s\\n' \"$@\" >> '{tmp}/curl.args'\n",
        "sleep": "exec /bin/sleep 0.1\n",
    }
    for name, body in commands.items():
        (folder / name).write_text(
            "#!/usr/bin/env bash\n" + body.replace("{tmp}", str(tmp_path)).replace("{{", "{").replace("}}", "}")
        )
        (folder / name).chmod(0o755)
    return folder


def launch(stubs: Path, *arguments: str) -> str:
    """What the dry run prints."""
    done = subprocess.run(
        [
            *(sys.executable, str(LAUNCH), "train", RECIPE, *HARD, "--account=acct", "--nodes=2", "--gpus-per-node=8"),
            *(f"--python={stubs}/python", f"--job-dir={stubs.parent}/jobs", *arguments),
        ],
        cwd=ROOT,
        env={**os.environ, "NEMORUN_HOME": str(stubs.parent / "home")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def batch_script(stubs: Path) -> Path:
    (script,) = (stubs.parent / "jobs").glob("experiments/g2rpo/*/*_sbatch.sh")
    return script


def run(stubs: Path, *, code: int, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the batch script, with a trainer that ends with a code."""
    job = {"SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "g2rpo", "SLURM_JOB_NODELIST": "gpu[07-08]"}
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "MASTER_", "MEGATRON_"))}
    environment = {**clean, **job, **variables, "PATH": f"{stubs}:{clean['PATH']}", "TRAINER_CODE": str(code)}
    environment |= {"LOGS": str(stubs.parent / "logs"), "SERVER_RESTARTS": "0"}
    return subprocess.run(
        ["bash", str(batch_script(stubs))], env=environment, capture_output=True, text=True, check=False, timeout=200
    )


def arguments(stubs: Path, name: str) -> list[str]:
    return (stubs.parent / f"{name}.args").read_text().split("\0")[:-1]


def variable(stubs: Path, program: str, name: str) -> str:
    (line,) = re.findall(rf"^{name}=(.*)$", (stubs.parent / f"{program}.env").read_text(), re.MULTILINE)
    return line


def headers(script: str) -> list[set[str]]:
    """Options of each component."""
    components: list[set[str]] = [set()]
    for line in re.findall(r"^#SBATCH (.*)$", script, re.MULTILINE):
        if line == "hetjob":
            components.append(set())
        elif not line.startswith(("--job-name", "--output")):
            components[-1].add(line)
    return components


COMMON = {"--account=acct", "--exclusive", "--mem=0", "--open-mode=append", "--signal=B:USR1@120", "--time=04:00:00"}


def test_the_trainer_alone(stubs: Path) -> None:
    printed = launch(stubs)
    script = batch_script(stubs).read_text()
    assert script in printed
    assert headers(script) == [{*COMMON, "--nodes=2", "--ntasks-per-node=8", "--gpus-per-node=8"}]
    done = run(stubs, code=0)
    assert done.returncode == 0, done.stderr
    cluster = ["cluster.num_nodes=2", "cluster.gpus_per_node=8"]
    assert arguments(stubs, "train") == ["-m", "megatron_g2rpo.cli", "train", RECIPE, *HARD, *cluster]
    expected = {
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "20077",
        "RANK": "0",
        "WORLD_SIZE": "16",
        "LOCAL_WORLD_SIZE": "8",
    }
    assert {name: variable(stubs, "train", name) for name in expected} == expected
    assert not (stubs.parent / "serve.args").exists()
    assert not (stubs.parent / "requeue").exists()


def test_beside_servers(stubs: Path) -> None:
    launch(stubs, "--server-nodes=2", "--engine-gpus=4", "--partition=p")
    script = batch_script(stubs).read_text()
    common = {*COMMON, "--partition=p", "--gpus-per-node=8", "--nodes=2"}
    assert headers(script) == [{*common, "--ntasks-per-node=8"}, {*common, "--ntasks-per-node=2"}]
    nodes = {"SLURM_JOB_NODELIST_HET_GROUP_0": "gpu[07-08]", "SLURM_JOB_NODELIST_HET_GROUP_1": "gpu[09-10]"}
    done = run(stubs, code=0, **nodes)
    assert done.returncode == 0, done.stderr
    both = [
        *("policy.generation.backend=vllm_server", "policy.generation.vllm_cfg.tensor_parallel_size=4"),
        f"policy.generation.vllm_server_cfg.addresses={SERVERS}",
    ]
    cluster = ["cluster.num_nodes=2", "cluster.gpus_per_node=8"]
    assert arguments(stubs, "train") == ["-m", "megatron_g2rpo.cli", "train", RECIPE, *HARD, *both, *cluster]
    listening = ["--host", "0.0.0.0", "--port", "8001"]
    assert arguments(stubs, "serve") == ["-m", "megatron_g2rpo.cli", "serve", RECIPE, *HARD, *both, *listening]
    steps = [line.split("\0") for line in (stubs.parent / "srun.args").read_text().splitlines()]
    trainer, servers = ([step for step in steps if f"--het-group={group}" in step] for group in (0, 1))
    assert {"--nodes=2", "--ntasks=16", "--ntasks-per-node=8"} <= set(trainer[0])
    assert {"--nodes=2", "--ntasks=4", "--ntasks-per-node=2"} <= set(servers[0])
    asked = (stubs.parent / "curl.args").read_text()
    assert re.findall(r"http://\S+", asked) == [f"{each}/health" for each in re.findall(r"http://\w+:\d+", SERVERS)]


def test_the_key_is_the_same_on_both_sides_and_not_in_the_log(stubs: Path) -> None:
    launch(stubs, "--server-nodes=2", "--engine-gpus=4")
    nodes = {"SLURM_JOB_NODELIST_HET_GROUP_0": "gpu[07-08]", "SLURM_JOB_NODELIST_HET_GROUP_1": "gpu[09-10]"}
    done = run(stubs, code=0, **nodes)
    key = variable(stubs, "train", "MEGATRON_G2RPO_API_KEY")
    assert re.fullmatch("[0-9a-f]{48}", key)
    assert variable(stubs, "serve", "MEGATRON_G2RPO_API_KEY") == key
    assert "G2RPO_SERVERS" in done.stderr, "the script is traced, so that the key could be there"
    assert key not in done.stdout + done.stderr


@pytest.mark.parametrize(("code", "requeued", "ends_with"), [(75, True, 75), (0, False, 0), (1, False, 1)])
def test_a_run_that_was_stopped_and_saved_is_requeued_and_no_other(
    stubs: Path, code: int, requeued: bool, ends_with: int
) -> None:
    launch(stubs)
    done = run(stubs, code=code)
    assert (stubs.parent / "requeue").exists() == requeued
    assert done.returncode == ends_with


def test_a_container_sees_the_repository_and_its_own_python(stubs: Path) -> None:
    image = ["--container-image=nvcr.io/x:1", "--container-mounts=/data:/data", "--python=python3"]
    launch(stubs, *image)
    (step,) = re.findall(r"^(srun .*) & pids", batch_script(stubs).read_text(), re.MULTILINE)
    words = shlex.split(step)
    assert words[words.index("--container-image") + 1] == "nvcr.io/x:1"
    mounts = words[words.index("--container-mounts") + 1].split(",")
    assert mounts[:2] == [f"{ROOT}:{ROOT}", "/data:/data"]
