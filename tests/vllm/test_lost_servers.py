# SPDX-License-Identifier: Apache-2.0
"""A run whose only server is killed: it ends with a message and a checkpoint, or waits, as the recipe says."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.conftest import toy, warm  # noqa: F401 (fixtures)
from tests.e2e.toy import ROOT, Toy, metrics, only_error
from tests.vllm.servers import ServerProcess, free_port

# Three starts of a server, one after another.
pytestmark = [pytest.mark.full, pytest.mark.timeout(1200)]

STEPS = 6
ENGINE = ["policy.generation.vllm_cfg.kv_cache_memory_bytes=67108864", "policy.generation.vllm_cfg.enforce_eager=true"]


@pytest.fixture
def ends() -> Iterator[ExitStack]:
    """Ends servers and runs that a failed test would leave."""
    with ExitStack() as stack:
        yield stack


def test_a_run_that_loses_its_server(toy: Toy, tmp_path: Path, ends: ExitStack) -> None:  # noqa: F811
    port, run = free_port(), tmp_path / "run"
    server = {
        "addresses": [f"http://127.0.0.1:{port}"],
        "weights_dir": str(tmp_path / "weights"),
        "on_no_server": "fail",
    }
    recipe = toy.recipe(
        tmp_path / "recipe.yaml",
        grpo={"max_num_steps": STEPS, "val_at_start": False},
        checkpointing={"save_period": 100},
        policy={"generation": {"backend": "vllm_server", "vllm_server_cfg": server}},
        logger={"log_dir": str(run)},
    )

    def serve(name: str) -> ServerProcess:
        started = ServerProcess(recipe, tmp_path / f"{name}.log", *ENGINE, port=port)
        ends.callback(started.kill)
        started.wait()
        return started

    # It fails: the message names the server and the checkpoint, and steps that were taken are saved.
    first = serve("first")
    failed, errors = start(recipe, tmp_path / "failed.log")
    ends.callback(failed.kill)
    wait_for(lambda: last_step(run) >= 2, failed)  # a step takes longer than the look at it
    first.kill()
    assert failed.wait(timeout=300) == 1
    before, error, message = errors.read_text().partition("error: ")  # what comes before is a warning at most
    message = only_error(error + message)
    assert "Traceback" not in before
    assert f"no rollout server is left (policy.generation.vllm_server_cfg.addresses):\n  {first.address}: " in message
    saved = int(re.search(r"(\d+) steps are saved in", message)[1])  # type: ignore[index]
    assert saved >= 2
    assert saved == last_step(run)
    assert (run / "checkpoints" / f"step_{saved}" / "metadata.json").exists()

    # The same command goes on from there, and this time waits for a server that comes back without its weights.
    second = serve("second")
    waits, errors = start(recipe, tmp_path / "waits.log", "policy.generation.vllm_server_cfg.on_no_server=wait")
    ends.callback(waits.kill)
    wait_for(lambda: last_step(run) > saved, waits)
    second.kill()
    wait_for(lambda: "waiting for one; the next look is in" in errors.read_text(), waits)
    serve("third")
    assert waits.wait(timeout=300) == 0, errors.read_text()[-4000:]
    lines = metrics(run)  # no step may come twice
    assert sorted(lines) == list(range(1, STEPS + 1))
    assert all(line["train/rollout_gap_max"] < 1e-4 for line in lines.values())
    assert (run / "hf" / "model.safetensors").exists()
    assert not list((tmp_path / "weights").glob("*")), "the weights on their way are removed"


def start(recipe: Path, log: Path, *overrides: str) -> tuple[subprocess.Popen[bytes], Path]:
    """``megatron-g2rpo train`` in the background; its standard error goes to ``log``."""
    script = Path(sys.executable).with_name("megatron-g2rpo")
    with log.open("w") as errors:
        process = subprocess.Popen(
            [str(script), "train", str(recipe), *overrides],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=errors,
        )
    return process, log


def last_step(run: Path) -> int:
    """Newest step in the run's metrics; 0 before the first."""
    file = run / "metrics.jsonl"
    return max(metrics(run), default=0) if file.exists() else 0


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], seconds: float = 400) -> None:
    """Until the condition holds; the process must live that long."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, "the run ended"
        assert time.monotonic() < end, "it takes too long"
        time.sleep(0.05)
