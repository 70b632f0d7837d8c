# SPDX-License-Identifier: Apache-2.0
"""slurm/train_g2rpo.sh: what it would launch, with Slurm's commands replaced by stubs.

A real scheduler and real training: ``on_cluster``.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.conftest import JOB, PORT, RECIPE, ROOT, SFT_RECIPE, Run, Stubs

SCRIPT = "train_g2rpo.sh"
LOGS = str(ROOT / "slurm-g2rpo-123456")
# What a shell would split, expand or strip if one quote were missing.
HARD = ['data.system_prompt=it\'s a "test" of $HOME, `id` and *', "data.train.path='two  spaces'", "grpo.seed=3"]


def expected(nodes: int, gpus: int, overrides: list[str], logs: str = LOGS) -> list[str]:
    return [
        *(f"--nodes={nodes}", f"--ntasks={nodes * gpus}", f"--ntasks-per-node={gpus}", "--cpu-bind=none"),
        *("--kill-on-bad-exit=1", "--label", "bash", "slurm/rank.sh", logs),
        *(sys.executable, "-m", "megatron_g2rpo.cli", "train", RECIPE, *overrides),
        *(f"cluster.num_nodes={nodes}", f"cluster.gpus_per_node={gpus}"),
    ]


def test_a_task_a_gpu_and_arguments_arrive_as_they_were_typed(stubs: Stubs, run: Run) -> None:
    result = run(SCRIPT, RECIPE, *HARD, **JOB)
    assert result.returncode == 0, result.stderr
    assert stubs.launched() == expected(2, 8, HARD)
    assert f"at gpu07:{PORT}" in result.stdout


def test_a_dry_run_prints_what_would_run_and_runs_nothing(stubs: Stubs, run: Run) -> None:
    """And what it prints can be pasted."""
    result = run(SCRIPT, RECIPE, *HARD, DRYRUN="1", **JOB)
    assert result.returncode == 0, result.stderr
    assert not (stubs.records / "srun.args").exists()
    cd, export, command = result.stdout.splitlines()
    assert shlex.split(cd) == ["cd", str(ROOT)]
    assert shlex.split(export) == ["export", "MASTER_ADDR=gpu07", f"MASTER_PORT={PORT}"]
    assert shlex.split(command) == ["srun", *expected(2, 8, HARD)]
    subprocess.run(["bash", "-c", result.stdout], cwd="/", env=stubs.environment(), check=True)
    assert stubs.launched() == expected(2, 8, HARD)
    assert (stubs.records / "srun.cwd").read_text() == f"{ROOT}\n"


def test_a_dry_run_needs_no_slurm_and_takes_the_layout_of_the_recipe(run: Run) -> None:
    overrides = ["cluster.num_nodes=3", "cluster.gpus_per_node=2"]
    result = run(SCRIPT, RECIPE, *overrides, DRYRUN="1")
    assert result.returncode == 0, result.stderr
    logs = str(ROOT / "slurm-g2rpo-0")
    assert shlex.split(result.stdout.splitlines()[2])[1:] == expected(3, 2, overrides, logs)


def test_the_recipe_says_which_loop(run: Run) -> None:
    result = run(SCRIPT, SFT_RECIPE, DRYRUN="1")
    assert result.returncode == 0, result.stderr
    assert f"megatron_g2rpo.cli sft {SFT_RECIPE} " in result.stdout


def test_without_gpus_the_recipe_says_how_many_processes(stubs: Stubs, run: Run) -> None:
    """Also where Slurm says 0, as some versions do."""
    result = run(SCRIPT, RECIPE, "cluster.gpus_per_node=2", **{**JOB, "SLURM_GPUS_ON_NODE": "0"})
    assert result.returncode == 0, result.stderr
    assert "--ntasks-per-node=2" in stubs.launched()


def test_pyxis_gets_the_image_and_the_recipe_is_read_inside(stubs: Stubs, run: Run) -> None:
    """The first srun reads the recipe; the stub stands for the container's Python."""
    stubs.write(
        "srun",
        f"printf '%s\\n' \"$*\" >> '{stubs.records}/calls'\n"
        '[[ " $* " == *" python3 - "* ]] || exit 0\nwhile [ "$1" != - ]; do shift; done\n'
        f"exec '{sys.executable}' \"$@\"",
    )
    variables = {**JOB, "PYTHON": "", "CONTAINER_IMAGE": "a.sqsh", "CONTAINER_MOUNTS": "/data:/data"}
    result = run(SCRIPT, RECIPE, SRUN_ARGS="--container-writable --mpi=none", **variables)
    assert result.returncode == 0, result.stderr
    container = f"--container-image=a.sqsh --container-mounts={ROOT}:{ROOT},/data:/data --container-workdir={ROOT}"
    reading, training = (stubs.records / "calls").read_text().splitlines()
    assert reading.startswith(f"--nodes=1 --ntasks=1 {container} python3 - {RECIPE}")
    assert f" --label {container} --container-writable --mpi=none bash slurm/rank.sh {LOGS} python3 -m " in training


def test_apptainer_runs_each_rank(run: Run) -> None:
    variables = {**JOB, "PYTHON": "", "CONTAINER_IMAGE": "a.sif", "CONTAINER_RUNTIME": "apptainer"}
    # A dry run reads the recipe outside, by an interpreter of its own.
    result = run(SCRIPT, RECIPE, DRYRUN="1", **variables)
    assert result.returncode == 0, result.stderr
    inside = (
        f" --label apptainer exec --pwd {ROOT} --bind {ROOT}:{ROOT} --nv a.sif bash slurm/rank.sh {LOGS} python3 -m "
    )
    assert inside in result.stdout


def test_staged_data_is_copied_and_replaces_the_recipes(run: Run, tmp_path: Path) -> None:
    """One dataset by its folder, several by a list, with their weights; a glob takes its folder."""
    folder = tmp_path / "shards"
    folder.mkdir()
    paths = f"data.train.path=['{folder}', {{path: '{folder}/*-1.tar', weight: 2}}]"
    result = run(
        SCRIPT, RECIPE, paths, f"data.validation.path={folder}", STAGE_DATA="1", STAGE_DIR="/disk", DRYRUN="1", **JOB
    )
    assert result.returncode == 0, result.stderr
    stage, train = (shlex.split(line) for line in result.stdout.splitlines()[2:])
    disk = "/disk/g2rpo-data-123456"
    pairs = [(folder, f"{disk}/train/0"), (folder, f"{disk}/train/1"), (folder, f"{disk}/validation/0")]
    assert stage[stage.index("slurm/stage.sh") + 1 :] == [str(part) for pair in pairs for part in pair]
    assert train[-4:-2] == [
        f'data.train.path=[{{"path": "{disk}/train/0", "weight": 1.0}}, '
        f'{{"path": "{disk}/train/1/*-1.tar", "weight": 2.0}}]',
        f'data.validation.path="{disk}/validation/0"',
    ]


def test_a_chain_submits_jobs_like_this_one(stubs: Stubs, run: Run, tmp_path: Path) -> None:
    """Each after the one before it, with what Slurm says of the first.

    The run directory is the test's own: a chain looks there for a run that is finished, and the recipe's may hold one.
    """
    overrides = [f"logger.log_dir={tmp_path}/run", "grpo.seed=3"]
    stubs.write("sbatch", f"printf '%s\\n' \"$*\" >> '{stubs.records}/sbatch'; wc -l < '{stubs.records}/sbatch'")
    stubs.write("squeue", "echo '2|gpu|lab|N/A|4:00:00|(null)||my-run|gres:gpu:8'")
    result = run(SCRIPT, RECIPE, *overrides, CHAIN="3", SBATCH_ARGS="--mail-type=END", **JOB)
    assert result.returncode == 0, result.stderr
    options = "--nodes=2 --partition=gpu --account=lab --time=4:00:00 --job-name=my-run --gres=gpu:8 --mail-type=END"
    assert (stubs.records / "sbatch").read_text().splitlines() == [
        f"--parsable --dependency=afterany:{previous} --export=ALL,CHAIN_LINK={link} {options} "
        f"slurm/{SCRIPT} {RECIPE} {' '.join(overrides)}"
        for previous, link in ((123456, 2), (1, 3))
    ]
    # A later job of the chain, or the first when it is requeued, submits nothing.
    for variables in ({"CHAIN_LINK": "2"}, {"SLURM_RESTART_COUNT": "1"}):
        (stubs.records / "sbatch").unlink(missing_ok=True)
        assert run(SCRIPT, RECIPE, *overrides, CHAIN="3", **variables, **JOB).returncode == 0
        assert not (stubs.records / "sbatch").exists()


def test_a_chain_on_a_finished_run_submits_nothing(stubs: Stubs, run: Run, tmp_path: Path) -> None:
    """A dry run says so as well."""
    stubs.write("sbatch", f"touch '{stubs.records}/sbatch'; echo 1")
    (tmp_path / "run" / "checkpoints" / "step_3").mkdir(parents=True)
    overrides = [f"logger.log_dir={tmp_path}/run", "grpo.max_num_steps=3", "checkpointing.export_hf=false"]
    for variables, says in (
        ({}, "train_g2rpo.sh: the run is finished"),
        ({"DRYRUN": "1"}, "# train_g2rpo.sh: the run"),
    ):
        result = run(SCRIPT, RECIPE, *overrides, CHAIN="5", **variables, **JOB)
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith(says)
        assert not (stubs.records / "sbatch").exists()
        assert not (stubs.records / "srun.args").exists()


def test_it_runs_from_the_spool_directory_as_under_sbatch(stubs: Stubs, run: Run, tmp_path: Path) -> None:
    spooled = tmp_path / "slurm_script"
    shutil.copy(ROOT / "slurm" / SCRIPT, spooled)
    result = run(spooled, RECIPE, **JOB, SLURM_SUBMIT_DIR=str(ROOT))
    assert result.returncode == 0, result.stderr
    assert (stubs.records / "srun.cwd").read_text() == f"{ROOT}\n"


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
        ([RECIPE], {**JOB, "SLURM_SUBMIT_DIR": "/"}, "/ is not the repository; submit from there"),
        (
            [RECIPE],
            {**JOB, "CONTAINER_IMAGE": "a", "CONTAINER_RUNTIME": "docker"},
            "CONTAINER_RUNTIME=docker is neither pyxis nor apptainer",
        ),
    ],
)
def test_a_mistake_ends_the_job_before_anything_starts(
    stubs: Stubs, run: Run, arguments: list[str], variables: dict[str, str], message: str
) -> None:
    result = run(SCRIPT, *arguments, **variables)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (stubs.records / "srun.args").exists()


@pytest.mark.parametrize("script", sorted((ROOT / "slurm").glob("*.sh")), ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck, "shellcheck is part of the dev extra"
    result = subprocess.run(
        [shellcheck, "--external-sources", str(script)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout
