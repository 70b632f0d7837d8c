# SPDX-License-Identifier: Apache-2.0
"""Claims: the first signal is kept, the second ends a process that waits in C; a deadline leaves time to save."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from megatron_g2rpo.policy.device import init_process_group, select
from megatron_g2rpo.recipe.run_sections import seconds_of
from megatron_g2rpo.train.run import signals, slurm_time, stopping
from megatron_g2rpo.train.run.slurm_time import SLURM_END
from megatron_g2rpo.train.run.stopping import Stopping

# A rank: its main thread waits in C, as in a collective, where no handler of Python's is called.
RANK = """
import ctypes, os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and then stays so
from megatron_g2rpo.train.run import signals
assert "torch" not in sys.modules, "signals are to be watched before torch is imported"
with signals.watched():
    for phase in sys.argv[1:]:
        getattr(signals.current(), phase)()
    print("ready", flush=True)
    ctypes.CDLL(None).read(os.pipe()[0], ctypes.create_string_buffer(1), 1)
"""


def ended(*steps: int | float, phases: tuple[str, ...] = ("begin",)) -> tuple[int, str]:
    """Exit code and messages of a process that is sent signals; a float is a pause, seconds."""
    command = [sys.executable, "-c", RANK, *phases]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        for step in steps:
            if isinstance(step, float):
                time.sleep(step)
            else:
                process.send_signal(step)
        try:
            _, error = process.communicate(timeout=20)
        finally:
            process.kill()
    return process.returncode, error


def test_a_second_signal_ends_a_process_that_waits_in_a_collective() -> None:
    code, error = ended(signal.SIGUSR1, 0.2, signal.SIGTERM)
    assert code == 128 + signal.SIGTERM
    assert error.splitlines() == [
        "asked to stop by SIGUSR1: the run saves as soon as it can, and stops; a second signal ends it at once",
        "ended by SIGTERM; the same command goes on from the newest checkpoint",
    ]


def test_one_request_that_comes_on_several_ways_is_one() -> None:
    """To the rank itself twice within a second, and from its launcher; what ends it here is another signal."""
    passed_on = (signals.FORWARDED, signal.SIGUSR1, 0.1, signal.SIGUSR1, signals.FORWARDED, 0.2)
    code, error = ended(*passed_on, signal.SIGHUP)
    assert code == 128 + signal.SIGHUP, error
    assert error.count("asked to stop") == 1


@pytest.mark.parametrize("phases", [(), ("begin", "saved")])
def test_a_process_with_nothing_to_lose_ends_at_once_with_the_code_that_requeues(phases: tuple[str, ...]) -> None:
    assert ended(signal.SIGTERM, phases=phases)[0] == signals.STOPPED


def test_after_the_run_a_first_signal_changes_nothing_and_a_second_ends_the_process() -> None:
    code, error = ended(signal.SIGUSR1, 0.2, signal.SIGHUP, phases=("begin", "done"))
    assert code == 128 + signal.SIGHUP
    assert error.splitlines()[0] == (
        "asked to stop by SIGUSR1: the run is about to end; a second signal ends it at once"
    )


# A program: what it has to do is over, and its shutdown waits for it to be sent signals, in what is registered there.
SHUTDOWN = """
import atexit, sys
from megatron_g2rpo.train.run import signals
signals.for_good()
def wait():
    print("ready", flush=True)
    sys.stdin.readline()
if sys.argv[1] == "thread":
    import threading
    threading.Thread(target=lambda: (threading.main_thread().join(), wait())).start()
else:
    atexit.register(wait)
with signals.watched():
    signals.current().begin()
sys.exit(3)
"""


@pytest.mark.parametrize("where", ["thread", "atexit"])
def test_a_signal_while_a_program_shuts_down_does_not_change_how_it_ends(where: str) -> None:
    command = [sys.executable, "-c", SHUTDOWN, where]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGUSR1)
        assert "asked to stop by SIGUSR1: the run is about to end" in process.stderr.readline()
        for number in (signals.FORWARDED, signal.SIGUSR1):
            process.send_signal(number)
        _, error = process.communicate("end\n", timeout=20)
    assert process.returncode == 3, error


def test_signals_do_again_what_they_did_when_the_run_is_over() -> None:
    before = [signal.getsignal(number) for number in signals.STOP_SIGNALS]
    with signals.watched():
        signals.current().begin()
        os.kill(os.getpid(), signal.SIGUSR1)
        limit = time.monotonic() + 10.0
        while signals.current().number is None:
            assert time.monotonic() < limit
            time.sleep(0.001)
    assert [signal.getsignal(number) for number in signals.STOP_SIGNALS] == before
    assert signals.current().number is None


class Clock:
    """Stands for ``time`` in the module under test."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now + 1e9


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    init_process_group(select("cpu"))
    clock = Clock()
    for module in (stopping, slurm_time):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(stopping, "STARTED", clock.now)
    return clock


def test_a_deadline_leaves_time_for_the_longest_step_and_checkpoint(clock: Clock) -> None:
    run = Stopping("00:00:10:00", environment={})
    run.begin()
    clock.now += 100.0
    run.step_ended()
    run.saved_in(30.0)
    clock.now += 40.0
    run.step_ended()  # a shorter one
    clock.now = 1000.0 + 600.0 - 131.0
    assert run.agreed(steps=1) is None
    clock.now += 1.0
    assert run.agreed(steps=1) == "checkpointing.checkpoint_must_save_by"
    assert run.asked() is None, "a step that is under way can still be dropped"
    clock.now += 100.0
    assert run.asked() == "checkpointing.checkpoint_must_save_by"


def test_slurm_s_end_leaves_a_minute(clock: Clock) -> None:
    run = Stopping(None, environment={SLURM_END: str(int(1e9 + clock.now + 300))})
    run.begin()
    clock.now += 239.0
    assert run.agreed(steps=1) is None
    clock.now += 1.0
    assert run.agreed(steps=1) == "the end of the Slurm job (SLURM_JOB_END_TIME)"
    assert Stopping(None, environment={}).agreed(steps=1) is None


@pytest.mark.parametrize(
    ("number", "left", "is_notice"),
    [
        (signals.FORWARDED, 115, True),
        (signal.SIGUSR1, 115, True),
        (signals.FORWARDED, 600, False),  # as of a job that is preempted
        (signal.SIGTERM, 115, False),
    ],
)
def test_slurm_s_notice_of_the_end_is_a_deadline(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, number: int, left: int, is_notice: bool
) -> None:
    """A time limit shorter than the start would else queue the job again for ever."""
    monkeypatch.setenv(SLURM_END, str(int(clock.time()) + left))
    said: list[tuple[int, str]] = []

    def end(code: int, line: str) -> None:
        said.append((code, line))
        raise SystemExit

    monkeypatch.setattr(signals, "_end", end)
    with pytest.raises(SystemExit):
        signals.StopRequest().received(number)
    assert said[0][0] == (1 if is_notice else signals.STOPPED)
    assert ("submit the job with a longer time limit" in said[0][1]) is is_notice
    request = signals.StopRequest()
    run = Stopping(None, request)
    run.begin()
    request.received(number)
    reason = run.agreed()
    assert reason is not None
    assert (stopping.remedy(reason) is not None) is is_notice


def test_times_are_days_hours_minutes_and_seconds() -> None:
    assert seconds_of("01:02:03:04") == 86400 + 2 * 3600 + 3 * 60 + 4
    for wrong in ("03:04", "1:2:3:x", "", "-1:00:00:00"):
        with pytest.raises(ValueError, match="DD:HH:MM:SS"):
            seconds_of(wrong)
