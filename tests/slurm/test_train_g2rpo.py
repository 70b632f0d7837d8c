# SPDX-License-Identifier: Apache-2.0
"""slurm/train_g2rpo.sh: what it would launch, with Slurm's commands replaced by stubs.

Not tested here: a real scheduler, several machines, and the training that the launchers start.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "slurm" / "train_g2rpo.sh"
RECIPE = "examples/recipes/vlm_g2rpo-quickstart-1n1g-megatron-tp1.yaml"
JOB = {"SLURM_JOB_ID": "123456", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "gpu[07-08]", "SLURM_GPUS_ON_NODE": "8"}
# What a shell would split, expand or strip if one quote were missing.
HARD = ['data.system_prompt=it\'s a "test" of $HOME, `id` and *', "data.train.path='two  spaces'", "grpo.seed=3"]


@pytest.fixture
def stubs(tmp_path: Path) -> Path:
    """A folder with a `srun` that records its arguments and a `scontrol` that knows two hosts."""
    folder = tmp_path / "stubs"
    folder.mkdir()
    commands = {
        "srun": f"printf '%s\\0' \"$@\" > '{tmp_path}/srun.args'\npwd > '{tmp_path}/srun.cwd'",
        "scontrol": "[ \"$*\" = 'show hostnames gpu[07-08]' ] || exit 1\nprintf 'gpu07\\ngpu08\\n'",
    }
    for name, body in commands.items():
        path = folder / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
    return folder


def run(stubs: Path, *arguments: str, script: Path = SCRIPT, **variables: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("SLURM_", "MASTER_", "SRUN_"))}
    environment = {**clean, "PATH": f"{stubs}:{clean['PATH']}", "PYTHON": sys.executable, **variables}
    return subprocess.run(
        ["bash", str(script), *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


def launched(stubs: Path) -> list[str]:
    return (stubs.parent / "srun.args").read_text().split("\0")[:-1]


def expected(nodes: int, gpus: int, endpoint: str, job: str, overrides: list[str]) -> list[str]:
    return [
        *(f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1", "--cpu-bind=none", "--kill-on-bad-exit=1"),
        *(sys.executable, "-m", "torch.distributed.run"),
        *(f"--nnodes={nodes}", f"--nproc-per-node={gpus}", "--max-restarts=0"),
        *("--rdzv-backend=c10d", f"--rdzv-id={job}", f"--rdzv-endpoint={endpoint}"),
        *("-m", "megatron_g2rpo.cli", "train", RECIPE, *overrides),
        *(f"cluster.num_nodes={nodes}", f"cluster.gpus_per_node={gpus}"),
    ]


def test_one_launcher_per_node_meets_on_the_first_node(stubs: Path) -> None:
    result = run(stubs, RECIPE, "grpo.seed=3", **JOB)
    assert result.returncode == 0, result.stderr
    port = 20000 + 123456 % 12000
    assert launched(stubs) == expected(2, 8, f"gpu07:{port}", "123456", ["grpo.seed=3"])


def test_arguments_arrive_as_they_were_typed(stubs: Path) -> None:
    result = run(stubs, RECIPE, *HARD, **JOB)
    assert result.returncode == 0, result.stderr
    assert launched(stubs)[-5:-2] == HARD


def test_a_dry_run_prints_what_would_run_and_runs_nothing(stubs: Path) -> None:
    result = run(stubs, RECIPE, *HARD, DRYRUN="1", **JOB)
    assert result.returncode == 0, result.stderr
    assert not (stubs.parent / "srun.args").exists()
    cd, command = result.stdout.splitlines()
    assert shlex.split(cd) == ["cd", str(ROOT)]
    assert shlex.split(command) == ["srun", *expected(2, 8, f"gpu07:{20000 + 123456 % 12000}", "123456", HARD)]


def test_the_printed_commands_can_be_pasted(stubs: Path) -> None:
    printed = run(stubs, RECIPE, *HARD, DRYRUN="1", **JOB).stdout
    environment = {**os.environ, "PATH": f"{stubs}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-c", printed], cwd="/", env=environment, check=True)
    assert launched(stubs)[-5:-2] == HARD
    assert (stubs.parent / "srun.cwd").read_text() == f"{ROOT}\n"


def test_a_dry_run_needs_no_slurm_and_takes_the_layout_of_the_recipe(stubs: Path) -> None:
    result = run(stubs, RECIPE, "cluster.num_nodes=3", "cluster.gpus_per_node=2", DRYRUN="1")
    assert result.returncode == 0, result.stderr
    overrides = ["cluster.num_nodes=3", "cluster.gpus_per_node=2"]
    assert shlex.split(result.stdout.splitlines()[1])[1:] == expected(3, 2, "localhost:20000", "0", overrides)


@pytest.mark.parametrize("gpus", [{}, {"SLURM_GPUS_ON_NODE": "0"}])
def test_without_gpus_the_recipe_says_how_many_processes(stubs: Path, gpus: dict[str, str]) -> None:
    job = {key: value for key, value in JOB.items() if key != "SLURM_GPUS_ON_NODE"}
    result = run(stubs, RECIPE, "cluster.gpus_per_node=2", **job, **gpus)
    assert result.returncode == 0, result.stderr
    assert "--nproc-per-node=2" in launched(stubs)


def test_what_slurm_grants_replaces_the_layout_of_the_recipe(stubs: Path) -> None:
    result = run(stubs, RECIPE, "cluster.num_nodes=64", **JOB)
    assert result.returncode == 0, result.stderr
    assert launched(stubs)[-2:] == ["cluster.num_nodes=2", "cluster.gpus_per_node=8"]


def test_srun_arguments_are_passed_on(stubs: Path) -> None:
    result = run(stubs, RECIPE, **JOB, SRUN_ARGS="--container-image=a.sqsh --label")
    assert result.returncode == 0, result.stderr
    assert launched(stubs)[5:7] == ["--container-image=a.sqsh", "--label"]


def test_it_runs_from_the_spool_directory_as_under_sbatch(stubs: Path, tmp_path: Path) -> None:
    spooled = tmp_path / "slurm_script"
    shutil.copy(SCRIPT, spooled)
    result = run(stubs, RECIPE, script=spooled, **JOB, SLURM_SUBMIT_DIR=str(ROOT))
    assert result.returncode == 0, result.stderr
    assert (stubs.parent / "srun.cwd").read_text() == f"{ROOT}\n"


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        ([], JOB, "no recipe given; usage: sbatch slurm/train_g2rpo.sh RECIPE"),
        (["nowhere.yaml"], JOB, "recipe 'nowhere.yaml' does not exist (working directory: "),
        ([RECIPE], {}, "not inside a Slurm job; submit with sbatch, or set DRYRUN=1"),
        ([RECIPE, "grpo.sed=3"], JOB, "unknown key 'grpo.sed'; nearest valid key: grpo.seed"),
        ([RECIPE, "--fresh"], JOB, "override '--fresh': expected key=value"),
        ([RECIPE, "policy.megatron_cfg.tensor_model_parallel_size=3"], JOB, "= 16, not a multiple of the 3"),
        ([RECIPE], {**JOB, "SLURM_JOB_NODELIST": "elsewhere"}, "scontrol does not know the nodes elsewhere"),
        ([RECIPE], {**JOB, "SLURM_SUBMIT_DIR": "/nowhere"}, "cannot enter the directory of submission, /nowhere"),
    ],
)
def test_a_mistake_ends_the_job_before_anything_starts(
    stubs: Path, arguments: list[str], variables: dict[str, str], message: str
) -> None:
    result = run(stubs, *arguments, **variables)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (stubs.parent / "srun.args").exists()


def test_the_launchers_of_two_nodes_form_one_world(stubs: Path, tmp_path: Path) -> None:
    """The real torchrun, started twice on this machine in the place of srun; the training is a stub."""
    package = tmp_path / "submit" / "megatron_g2rpo"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    # What loading a recipe needs: its names are looked up in the registries, which import mathematics and tasks.
    for name in ("recipe", "objective", "tasks", "registry.py", "extend.py", "types.py", "collectives.py"):
        (package / name).symlink_to(ROOT / "megatron_g2rpo" / name)
    (package / "cli.py").write_text(
        "import json, os, sys\n"
        f"with open(f'{tmp_path}/rank' + os.environ['RANK'], 'w') as file:\n"
        "    json.dump([os.environ['WORLD_SIZE'], os.environ['LOCAL_WORLD_SIZE'], sys.argv[1:]], file)\n"
    )
    (stubs / "srun").write_text(
        '#!/usr/bin/env bash\nwhile [[ $1 == --* ]]; do shift; done\n"$@" & first=$!\n"$@" && wait "$first"\n'
    )
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    job = {**JOB, "SLURM_GPUS_ON_NODE": "2", "SLURM_SUBMIT_DIR": str(package.parent), "OMP_NUM_THREADS": "1"}
    result = run(stubs, str(ROOT / RECIPE), *HARD, **job, MASTER_ADDR="localhost", MASTER_PORT=port)
    assert result.returncode == 0, result.stderr
    arguments = ["train", str(ROOT / RECIPE), *HARD, "cluster.num_nodes=2", "cluster.gpus_per_node=2"]
    for rank in range(4):
        assert json.loads((tmp_path / f"rank{rank}").read_text()) == ["4", "2", arguments]


@pytest.mark.parametrize("script", sorted((ROOT / "slurm").glob("*.sh")), ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck, "shellcheck is part of the dev extra"
    result = subprocess.run([shellcheck, str(script)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
