# SPDX-License-Identifier: Apache-2.0
"""Jobs on a real Slurm of two nodes: what the pages say works, a stopped run goes on, and nothing is lost."""

from __future__ import annotations

import re
import shlex
import time
from pathlib import Path

import pytest

from tests.common.console_rows import row_of
from tests.e2e.toy import ROOT, Toy, metrics, numbers
from tests.slurm.cluster import Cluster
from tests.slurm.on_cluster.conftest import JOB_SECONDS, Submit, output_of

pytestmark = [pytest.mark.full, pytest.mark.slurm, pytest.mark.timeout(1500)]

STEPS = 8
NODES = ("--nodes=2", "--time=30")


def recipe_of(toy: Toy, path: Path, run: Path) -> Path:
    """Two ranks on a node, eight steps, and checkpoints only where the run is told to save."""
    return toy.recipe(
        path,
        grpo={"max_num_steps": STEPS, "val_at_start": False, "val_at_end": False},
        checkpointing={"save_period": 100, "export_hf": False},
        logger={"log_dir": str(run)},
        cluster={"num_nodes": 2, "gpus_per_node": 2},  # as the page's recipe has it: what the job will be granted
    )


def test_the_page_leads_to_a_running_job_and_preemption_changes_nothing(
    trained: Toy, cluster: Cluster, submit: Submit, tmp_path: Path
) -> None:
    """The commands of docs/slurm.md give the uninterrupted run, which the preempted one equals bit for bit.

    The layout is the same, so is every sum.
    """
    straight = recipe_of(trained, tmp_path / "straight.yaml", tmp_path / "straight")
    job = follow_the_page(cluster, straight, tmp_path)

    # Meanwhile the second job waits for the nodes.
    preempted = recipe_of(trained, tmp_path / "preempted.yaml", tmp_path / "preempted")
    stopped = submit("train_g2rpo.sh", preempted, options=NODES)
    ended = cluster.wait(job, "COMPLETED", "FAILED", seconds=JOB_SECONDS)
    assert ended["JobState"] == "COMPLETED", output_of(tmp_path, job)
    expected = {step: numbers(line) for step, line in metrics(tmp_path / "straight").items()}
    assert sorted(expected) == list(range(1, STEPS + 1))
    for rank in range(4):
        assert (tmp_path / f"slurm-g2rpo-{job}" / f"rank_{rank}.log").is_file()
    # Both nodes took part: what rank 0 says is in its file, and in the merged one with its label.
    log = (tmp_path / f"slurm-g2rpo-{job}" / "rank_0.log").read_text()
    assert row_of(STEPS).search(log), log
    merged = output_of(tmp_path, job)
    assert row_of(STEPS, label="0: ").search(merged), merged

    wait_for_steps(cluster, stopped, tmp_path / "preempted", 2)
    cluster.text("scancel", "--signal=USR1", "--batch", stopped)  # what `--signal=B:USR1@120` sends
    held = cluster.wait(stopped, "PENDING", "COMPLETED", "FAILED", seconds=JOB_SECONDS)
    assert (held["JobState"], held["Restarts"]) == ("PENDING", "1"), output_of(tmp_path, stopped)
    taken = len(metrics(tmp_path / "preempted"))
    assert 2 <= taken < STEPS
    cluster.start_requeued(stopped)
    ended = cluster.wait(stopped, "COMPLETED", "FAILED", seconds=JOB_SECONDS)
    assert ended["JobState"] == "COMPLETED", output_of(tmp_path, stopped)
    assert {step: numbers(line) for step, line in metrics(tmp_path / "preempted").items()} == expected


def follow_the_page(cluster: Cluster, recipe: Path, tmp_path: Path) -> str:
    """Run the first screen of docs/slurm.md, with a small recipe in the place of the page's; return the job's number.

    What installs, downloads and imports is left out, and held against the page's recipe by ``test_page``; everything
    from `plan` on is run. What `DRYRUN=1` prints outside the job is what the job then runs.
    """
    page = (ROOT / "docs" / "slurm.md").read_text()
    block = page.split("```bash\n", 1)[1].split("```", 1)[0].replace("\\\n", " ")
    lines = [line for line in block.splitlines() if line.strip()]
    start = next(number for number, line in enumerate(lines) if " plan " in line)
    job = ""
    for line in lines[start:]:
        line = re.sub(r"^JOB=\$\((.*)\)$", r"\1", line)
        words = [str(recipe) if word == "mine.yaml" else word for word in shlex.split(line, comments=True)]
        assert str(recipe) in words or words[0].startswith("slurm/attach.sh")
        words = [word for word in words if not word.startswith("--gres")]
        if "sbatch" in words:
            assert "--parsable" in words
            words.insert(words.index("sbatch") + 1, f"--output={tmp_path}/%x-%j.out")
        if words[0].startswith("slurm/attach.sh"):
            continue  # of its own: test_attach
        command = ["env", *words] if "=" in words[0] else words
        printed = cluster.text(*command, LOGS=str(tmp_path), OMP_NUM_THREADS="1")
        if "DRYRUN=1" in words:
            assert " --nodes=2 --ntasks=4 --ntasks-per-node=2 " in printed
        if "sbatch" in words:
            job = printed.strip()
    assert job.isdecimal(), lines
    return job


def wait_for_steps(cluster: Cluster, job: str, run: Path, count: int) -> None:
    """Until a run has logged so many steps."""
    end = time.monotonic() + JOB_SECONDS
    while time.monotonic() < end:
        state = cluster.state(job)["JobState"]
        assert state in ("RUNNING", "PENDING", "CONFIGURING"), (state, output_of(run.parent, job))
        log = run / "metrics.jsonl"
        if log.exists() and log.read_text().count("\n") >= count:
            return
        time.sleep(0.2)
    raise AssertionError(output_of(run.parent, job))


def test_a_chain_of_supervised_jobs_on_staged_data(
    trained: Toy, cluster: Cluster, submit: Submit, tmp_path: Path
) -> None:
    """The recipe says which loop; the data is read on the nodes' own disk; the second job finds the run finished.

    Looked into while it runs, by slurm/attach.sh.
    """
    recipe = trained.recipe(
        tmp_path / "sft.yaml",
        "sft",
        sft={"max_num_steps": 2},
        checkpointing={"export_hf": False},
        logger={"log_dir": str(tmp_path / "run")},
    )
    stage = tmp_path / "disk"
    stage.mkdir()
    variables = {"CHAIN": "2", "STAGE_DATA": "1", "STAGE_DIR": str(stage)}
    variables["SBATCH_ARGS"] = f"--output={tmp_path}/%x-%j.out"
    first = submit("train_g2rpo.sh", recipe, options=NODES, **variables)
    cluster.wait(first, "RUNNING", "COMPLETED", seconds=JOB_SECONDS)
    attached = cluster.text("slurm/attach.sh", first, "127.0.0.2", "printenv", "SLURMD_NODENAME")
    assert attached.strip() == "127.0.0.2"
    assert cluster.wait(first, "COMPLETED", "FAILED", seconds=JOB_SECONDS)["JobState"] == "COMPLETED", output_of(
        tmp_path, first
    )
    said = output_of(tmp_path, first)
    assert ", sft on 2 node(s) x 1 process(es)" in said
    assert f"{stage}/g2rpo-data-{first}/train/0" in (tmp_path / "run" / "recipe.yaml").read_text()
    assert list(stage.iterdir()) == []  # removed again
    assert sorted(metrics(tmp_path / "run")) == [1, 2]

    match = re.search(r"job (\d+) goes on after this one \(2 of 2\)", said)
    assert match is not None, said
    second = match[1]
    ended = cluster.wait(second, "COMPLETED", "FAILED", seconds=JOB_SECONDS)
    assert (ended["JobState"], ended["NumNodes"], ended["TimeLimit"]) == ("COMPLETED", "2", "00:30:00")
    assert "the run is finished" in output_of(tmp_path, second)


def test_a_killed_rank_ends_the_job_and_is_named(
    trained: Toy, cluster: Cluster, submit: Submit, tmp_path: Path
) -> None:
    """Within a minute, with the rank and the node in the merged output, and without being requeued."""
    recipe = recipe_of(trained, tmp_path / "recipe.yaml", tmp_path / "run")
    job = submit("train_g2rpo.sh", recipe, "env.reward_workers=1", options=NODES)  # which end with their ranks
    wait_for_steps(cluster, job, tmp_path / "run", 1)
    pid = cluster.text(
        "slurm/attach.sh", job, "127.0.0.2", "bash", "-c",
        "grep -lzx RANK=2 /proc/[0-9]*/environ 2>/dev/null | xargs -n1 dirname"
        " | while read -r p; do tr '\\0' ' ' <$p/cmdline | grep -q 'cli train' && basename $p; done | head -n 1",
    )  # fmt: skip
    cluster.text("kill", "-KILL", pid.strip())
    ended = cluster.wait(job, "FAILED", "COMPLETED", "PENDING", seconds=60)
    assert ended["JobState"] == "FAILED"
    assert "rank 2 on 127.0.0.2 was ended by signal 9" in output_of(tmp_path, job)
