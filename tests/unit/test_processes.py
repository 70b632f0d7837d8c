# SPDX-License-Identifier: Apache-2.0
"""Workers that start while their parent ends say nothing; any other fault of a start is told."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import os, sys
from multiprocessing.synchronize import SemLock
from megatron_g2rpo.processes import forkserver

class Damaged:
    def __reduce__(self):
        return int, ("no number",)

if __name__ == "__main__":
    context = forkserver()
    if sys.argv[1] == "semaphore":  # what the end of a parent does: the resource tracker removes them
        lock = context.Lock()
        SemLock._cleanup(lock._semlock.name)
        worker = context.Process(target=print, args=(lock,))
        worker.start()
        worker.join()
        print(worker.exitcode, flush=True)
        os._exit(0)  # an orderly end would remove the semaphore again
    elif sys.argv[1] == "pipe":
        from multiprocessing import forkserver as server
        sentinel, pipe = server.connect_to_new_process([])
        os.close(pipe)  # before anything was sent
        server.read_signed(sentinel)  # its process id
        print(server.read_signed(sentinel))
    else:
        worker = context.Process(target=print, args=(Damaged(),))
        worker.start()
        worker.join()
        print(worker.exitcode)
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("program") / "program.py"
    path.write_text(PROGRAM)
    return path


@pytest.mark.parametrize("what", ["semaphore", "pipe", "argument"])
def test_a_worker_speaks_of_its_own_faults_only(program: Path, what: str) -> None:
    done = subprocess.run(
        [sys.executable, str(program), what],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout.split() == ["1"], "the worker failed"
    if what == "argument":
        assert "ValueError: invalid literal for int() with base 10: 'no number'" in done.stderr
    else:
        assert done.stderr == ""
