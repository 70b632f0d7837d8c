# SPDX-License-Identifier: Apache-2.0
"""Claims: what a run says on a terminal and in a file, and that it is finished; a reader that leaves is no error."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from megatron_g2rpo import __version__
from tests.e2e.toy import ROOT, TASKS, Toy, call, metrics, succeed

PROGRAM = Path(sys.executable).with_name("megatron-g2rpo")
CONTROL = re.compile(r"\x1b\[[\d;?]*[a-zA-Z]")
# Of a step, and of what is before, between and after steps: see ``progress.enter`` and ``Timers``.
PHASES = {
    *("data", "generation", "rewards", "logprobs", "task_gradients", "update", "record"),
    *("start", "engine", "weights", "step", "validation", "checkpoint", "export", "report"),
}
SHORT = ("grpo.max_num_steps=2", "checkpointing.export_hf=false")


def on_a_terminal(*arguments: str | Path, environment: dict[str, str] | None = None) -> str:
    """Run ``megatron-g2rpo ARGUMENTS`` with a pseudo-terminal for its output; all that it wrote."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm-256color", **(environment or {})}
    for name in ("COLUMNS", "LINES", "FORCE_COLOR"):
        variables.pop(name, None)
    command = [str(PROGRAM), *map(str, arguments)]
    with subprocess.Popen(command, cwd=ROOT, env=variables, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        written = bytearray()
        try:
            while data := os.read(ours, 65536):
                written += data
        except OSError:  # how a terminal without a writer ends
            pass
        finally:
            os.close(ours)
    text = written.decode(errors="replace")
    assert process.returncode == 0, text[-3000:]
    return text


@pytest.fixture(scope="module")
def on_terminal(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> str:
    root = tmp_path_factory.mktemp("terminal")
    return on_a_terminal("train", toy.recipe(root / "recipe.yaml"), f"logger.log_dir={root / 'run'}", *SHORT)


def test_a_terminal_has_a_live_region_with_step_phase_and_every_task(on_terminal: str) -> None:
    plain = CONTROL.sub("", on_terminal).replace("\r", "\n")  # where the region was, the next line begins
    assert CONTROL.search(on_terminal)
    assert re.search(r"step [01]/2", plain)
    # The region is drawn twice a second: a phase of this small run may fall between.
    seen = set(re.findall(r"left +(\w+)", plain))
    assert len(seen) >= 2, seen
    assert seen <= PHASES
    for task in TASKS:
        assert re.search(rf"^{task} +\d\.\d\d\d ", plain, re.MULTILINE), task


def test_its_table_of_steps_is_above_the_region_as_in_a_file(on_terminal: str) -> None:
    plain = CONTROL.sub("", on_terminal).replace("\r", "\n")  # where the region was, the next line begins
    rows = re.findall(r"^ *(\d+) +\d\.\d\d\d ", plain, re.MULTILINE)
    assert rows == ["0", "1", "2"]


def test_a_file_has_first_lines_samples_a_line_a_step_and_a_summary(toy: Toy, tmp_path: Path) -> None:
    run = tmp_path / "run"
    recipe = toy.recipe(tmp_path / "recipe.yaml", logger={"log_dir": str(run)})
    text = succeed("train", recipe, *SHORT)
    assert "\x1b" not in text
    lines = text.splitlines()
    begin = ["run: ", "processes: ", "device: cpu, float32, gloo; layers local", "engine: transformers", "objective: "]
    starts = [next(number for number, line in enumerate(lines) if line.startswith(start)) for start in begin]
    assert starts == sorted(starts)
    assert "KL penalty 0.05" in text
    assert re.search(r"^plan: at most [\d,]+ tokens a step", text, re.MULTILINE)
    rows = [line.split() for line in lines if re.match(r" *\d+ +\d\.\d", line)]
    values = metrics(run)
    assert [row[0] for row in rows] == ["0", "1", "2"]
    assert rows[1][1] == f"{values[1]['train/reward']:.3f}"
    heading = next(line.split() for line in lines if line.split()[:2] == ["step", "reward"])
    assert "ref-kl" in heading
    shown = re.findall(r"^  (\w+) (\S+), (sampled|greedy), reward \d\.\d{3}: ", text, re.MULTILINE)
    assert {task for task, _, _ in shown} == set(TASKS), "three at a validation: each task in its turn"
    assert {kind for _, _, kind in shown} == {"greedy", "sampled"}
    assert all(key.rpartition("/")[2].startswith(f"{task}-") for task, key, _ in shown), "shard and sample"
    end = text[text.index("done: 2 steps") :]
    for task in (*TASKS, "mean"):
        assert re.search(rf"^  {task} +sampled \d\.\d{{3}} -> \d\.\d{{3}}   greedy ", end, re.MULTILINE), task
    assert f"in {run}:" in end
    assert f"checkpoints: {run / 'checkpoints'}/step_2" in end

    again = succeed("train", recipe, *SHORT)
    assert "the run has taken its 2 steps (" in again
    assert metrics(run) == values, "nothing was done"

    quiet = succeed("train", recipe, "--quiet", "grpo.max_num_steps=3", "checkpointing.export_hf=false")
    assert [line for line in quiet.splitlines() if not line.startswith("warning: ")] == []
    assert list(metrics(run)) == [0, 1, 2, 3]


def test_two_processes_say_it_once(toy: Toy, tmp_path: Path) -> None:
    recipe = toy.recipe(tmp_path / "recipe.yaml", logger={"log_dir": str(tmp_path / "run")})
    text = succeed("train", recipe, *SHORT, nproc=2)
    for start in ("run: ", "device: ", "plan: ", "done: "):
        assert len(re.findall(rf"^{start}", text, re.MULTILINE)) == 1, start
    shown = re.findall(r"^  (\w+) \S+, (?:sampled|greedy), reward ", text, re.MULTILINE)
    assert set(shown) == set(TASKS), "whichever rank has them"


def test_the_version_is_said() -> None:
    result = call("--version")
    assert (result.exit_code, result.stdout) == (0, f"megatron-g2rpo {__version__}\n")


@pytest.mark.parametrize("verb", ["train", pytest.param("plan", marks=pytest.mark.full)])
def test_a_reader_that_leaves_ends_what_prints_quietly(toy: Toy, tmp_path: Path, verb: str) -> None:
    recipe = toy.recipe(tmp_path / "recipe.yaml")
    options = ["--dry-run"] if verb == "train" else []
    command = shlex.join([str(PROGRAM), verb, str(recipe), *options])
    # The reader is gone before the first line.
    done = subprocess.run(
        ["bash", "-c", f"{command} | true"], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.stderr == ""


def test_a_trace_of_a_step_names_its_phases_and_the_run_says_where(toy: Toy, tmp_path: Path) -> None:
    run = tmp_path / "run"
    recipe = toy.recipe(tmp_path / "recipe.yaml", logger={"log_dir": str(run)})
    keys = ("logger.profile.enabled=true", "logger.profile.steps=[2]", "grpo.val_at_start=false")
    text = succeed("train", recipe, *SHORT, *keys)
    path = run / "profile" / "step_2-rank_0.json.gz"
    assert f"step 2: its trace is {path}" in text
    assert "  profile: traces and memory snapshots" in text
    import gzip
    import json

    with gzip.open(path, "rt") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"step 2", "generation", "rewards", "logprobs", "update"} <= names
