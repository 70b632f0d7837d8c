# SPDX-License-Identifier: Apache-2.0
"""Real servers for tests: started by the command line, killed like a machine that goes down."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx

from tests.vllm.common import ROOT

# Several processes import torch and vLLM: half a minute on two idle cores, and many on busy ones.
START_SECONDS = 600


class ServerProcess:
    """``megatron-g2rpo serve RECIPE``.

    Args:
        recipe: of the policy.
        log: file for its output.
        overrides: of the recipe.
    """

    def __init__(self, recipe: Path, log: Path, *overrides: str, port: int | None = None) -> None:
        self.port = port or free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.log = log
        script = Path(sys.executable).with_name("megatron-g2rpo")
        with log.open("w") as file:
            self._process = subprocess.Popen(
                [str(script), "serve", str(recipe), f"--port={self.port}", *overrides],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self) -> None:
        """Until it answers its health check."""
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            assert self._process.poll() is None, f"the server ended:\n{self.log.read_text()[-6000:]}"
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.address}/health", timeout=5).is_success:
                    return
            time.sleep(0.5)
        raise AssertionError(f"no answer within {START_SECONDS} s:\n{self.log.read_text()[-6000:]}")

    def running_requests(self) -> int:
        """Number of answers that it is generating at this moment, by its own count."""
        metrics = httpx.get(f"{self.address}/metrics", timeout=30).text
        (count,) = re.findall(r"^vllm:num_requests_running\{.*\} (\S+)$", metrics, re.MULTILINE)
        return int(float(count))

    def hold(self) -> None:
        """Let none of its processes go on, until ``go_on``."""
        os.killpg(self._process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        """Let all its processes go on."""
        os.killpg(self._process.pid, signal.SIGCONT)

    def kill(self) -> None:
        """All its processes, at once and without a word."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@contextlib.contextmanager
def serving(recipe: Path, directory: Path, count: int, *overrides: str) -> Iterator[list[ServerProcess]]:
    """Several servers, started together; none is left behind."""
    servers = [ServerProcess(recipe, directory / f"server_{number}.log", *overrides) for number in range(count)]
    try:
        for server in servers:
            server.wait()
        yield servers
    finally:
        for server in servers:
            server.kill()


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
