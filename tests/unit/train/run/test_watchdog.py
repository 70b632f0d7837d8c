# SPDX-License-Identifier: Apache-2.0
"""Claims: the rank that is blamed is the cause, not one that waits for it; who gets on is left alone."""

from __future__ import annotations

import dataclasses
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from megatron_g2rpo import progress
from megatron_g2rpo.train.run import beats, watchdog
from megatron_g2rpo.train.run.beats import Beat, Board
from megatron_g2rpo.train.run.watchdog import HangError, Watchdog, is_lost_peer, judged, limit_of

LIMIT = 100.0


def beat(number: int = 1, *, idle: float = 200.0, waits: bool = True, phases: int = 7, left: bool = False) -> Beat:
    return Beat(number, "node", 11, 3, "rewards", phases, idle, waits, "rewards.py:12 in slow", left)


def test_a_rank_that_does_nothing_outside_of_a_collective_is_blamed_by_line() -> None:
    assert judged({0: beat(), 1: beat(waits=False), 2: beat()}, [], LIMIT) == (
        "rank 1 (host node, pid 11; step 3, phase rewards for 200 s, at rewards.py:12 in slow) hangs"
    )


def test_of_ranks_that_do_nothing_those_that_are_furthest_behind_are_blamed() -> None:
    """On a GPU a rank that waits may look as if it worked: it waits for the device."""
    sentence = judged({0: beat(waits=False, phases=8), 1: beat(waits=False), 2: beat(phases=8)}, [], LIMIT)
    assert sentence is not None
    assert sentence.startswith("rank 1 (")
    assert "rank 0" not in sentence
    assert "rank 2" not in sentence


def test_ranks_wait_as_long_as_one_gets_on() -> None:
    assert judged({0: beat(), 1: beat(idle=99.0, waits=False)}, [], LIMIT) is None
    # The same beats are a hang once it does not.
    assert judged({0: beat(), 1: beat(idle=101.0, waits=False)}, [], LIMIT) is not None


def test_a_rank_whose_beats_do_not_come_is_blamed_before_all_others() -> None:
    sentence = judged({0: beat(waits=False), 1: beat()}, [1], LIMIT)
    assert sentence is not None
    assert sentence.startswith("rank 1 (")
    assert "stopped" in sentence


def test_where_all_wait_those_that_are_furthest_behind_are_named() -> None:
    sentence = judged({0: beat(phases=8), 1: beat(), 2: beat(phases=9, left=True)}, [], LIMIT)
    assert sentence is not None
    assert sentence.startswith("all ranks wait in collectives; furthest behind: rank 1 (")
    assert "rank 0" not in sentence


def test_what_comes_before_the_first_step_has_ten_minutes() -> None:
    assert limit_of("weights", LIMIT) == limit_of("engine", LIMIT) == 600.0
    assert limit_of("weights", 1200.0) == 1200.0
    assert limit_of("generation", LIMIT) == LIMIT
    assert limit_of("generation", None) == float("inf")
    starting = {0: beat(), 1: dataclasses.replace(beat(waits=False), phase="weights")}
    assert judged(starting, [], LIMIT) is None


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[/pytorch/gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1"), True),
        (RuntimeError("[..gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 20400ms for recv"), True),
        (dist.DistBackendError("NCCL error: remote process exited or there was a network error"), True),
        (dist.DistNetworkError("failed to recv"), True),
        (RuntimeError("shape mismatch"), False),
        (dist.DistBackendError("NCCL error: unhandled cuda error"), False),
        (ConnectionResetError("Connection reset by peer"), False),  # of a judge model, for example
    ],
)
def test_what_a_collective_raises_when_a_peer_has_ended_is_told_from_other_errors(error: Exception, lost: bool) -> None:
    assert is_lost_peer(error) is lost


def test_a_beat_that_does_not_come_is_known_by_the_readers_own_clock() -> None:
    store = dist.HashStore()
    board = Board(store, 2)
    board.publish(0, beat(1))
    assert list(board.read()) == [0], "rank 1 has not published yet, and is not waited for"
    board.publish(1, beat(1, left=True))
    board.read()
    time.sleep(0.3)
    board.publish(0, beat(2))
    board.read()
    assert board.silent(0.2) == [], "rank 0 has a new one, and rank 1 has left in order"
    time.sleep(0.3)
    board.read()
    assert board.silent(0.2) == [0]
    board.forget()
    assert board.silent(0.0) == []


def test_one_rank_judges() -> None:
    store = dist.HashStore()
    assert [Board(store, 2).claim() for _ in range(3)] == [True, False, False]


def watched(tmp_path: Path, seconds: float, *, advance: bool, limit: float | None = 0.8) -> list[BaseException]:
    ended: list[BaseException] = []
    dog = Watchdog(tmp_path / "stacks", limit, ended.append)
    dog.start()
    progress.enter("generation", step=4)
    until = time.monotonic() + seconds
    while time.monotonic() < until and not ended:
        time.sleep(0.05)
        if advance:
            progress.advance()
    dog.stop()
    return ended


def test_one_process_that_hangs_ends_with_its_stacks_written(tmp_path: Path) -> None:
    (error,) = watched(tmp_path, 20.0, advance=False)
    assert isinstance(error, HangError)
    assert "no progress for 0.8 s (cluster.watchdog_s): rank 0 (host" in str(error)
    assert "step 4, phase generation" in str(error)
    assert "test_watchdog.py" in str(error), "the line of this test"
    assert "in watched" in (tmp_path / "stacks" / "rank_0.txt").read_text()


def test_one_process_that_gets_on_or_is_not_limited_is_left_alone(tmp_path: Path) -> None:
    assert watched(tmp_path, 2.0, advance=True) == []
    assert watched(tmp_path, 2.0, advance=False, limit=None) == []
    assert not (tmp_path / "stacks").exists()


def test_a_job_that_was_suspended_did_not_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that wakes long after its time was stopped with its process, whatever the marks say."""
    jump = [0.0]
    clock = time.monotonic
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: clock() + jump[0])
    ended: list[BaseException] = []
    dog = Watchdog(tmp_path / "stacks", 60.0, ended.append)
    monkeypatch.setattr(dog, "_interval", 0.1)
    dog.start()
    progress.enter("update", step=1)
    time.sleep(0.5)
    jump[0] = 3600.0
    time.sleep(0.5)
    dog.stop()
    assert ended == []


# Keeps the store of a job, as the launcher of its first node does.
KEEPER = """
import time
import torch.distributed as dist
store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
time.sleep(600)
"""


@pytest.fixture
def keeper(monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[str]]:
    """A process that keeps the store of a job of two ranks, of which this process is the second."""
    with subprocess.Popen([sys.executable, "-c", KEEPER], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline())
            # What process groups give it: a call, or a new connection, that fails only then keeps a job for so long.
            half_an_hour = timedelta(minutes=30)
            store = dist.TCPStore("127.0.0.1", port, timeout=half_an_hour, wait_for_workers=False)
            monkeypatch.setattr(dist, "is_initialized", lambda: True)
            monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
            for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "node0"), ("MASTER_PORT", "29500")):
                monkeypatch.setenv(name, value)
            for module in (beats, watchdog):
                monkeypatch.setattr(module, "STORE_LIMIT", timedelta(seconds=1))
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["refuses", "silent"])
@pytest.mark.parametrize("known", [True, False], ids=["after-beats", "before-the-first"])
def test_a_rank_ends_soon_after_the_node_that_keeps_the_store_is_lost(
    keeper: subprocess.Popen[str], tmp_path: Path, how: signal.Signals, known: bool
) -> None:
    dog = Watchdog(tmp_path, 2.0, lambda error: None)
    if known:
        dog.start()
        while not dog._line.ask(lambda board: board.read()):
            time.sleep(0.05)
    keeper.send_signal(how)
    begun = time.monotonic()
    assert dog.who_is_gone() == ("the node that keeps the job's store (node0:29500) is gone, or its launcher has ended")
    dog.say_why("another error")
    if known:
        dog.stop()
    # Three questions and the watch's own of 1 s each, and some for a busy machine.
    assert time.monotonic() - begun < 15.0


def test_a_rank_that_waits_for_a_lost_node_says_so_instead_of_blaming_itself(
    keeper: subprocess.Popen[str], tmp_path: Path
) -> None:
    ended: list[BaseException] = []
    dog = Watchdog(tmp_path, 1.5, ended.append)
    dog.start()
    progress.enter("generation", step=4)
    while not dog._line.ask(lambda board: board.read()):
        time.sleep(0.05)
    keeper.kill()
    until = time.monotonic() + 30.0
    while not ended and time.monotonic() < until:
        time.sleep(0.05)
    dog.stop()
    assert "cluster.watchdog_s): the node that keeps the job's store (node0:29500) is gone" in str(ended[0])


def test_a_store_that_was_slow_is_asked_again(keeper: subprocess.Popen[str], tmp_path: Path) -> None:
    """Negative of the tests above: a busy first node is no lost one."""
    dog = Watchdog(tmp_path, 2.0, lambda error: None)
    dog.say_why("before")
    keeper.send_signal(signal.SIGSTOP)
    with pytest.raises(dist.DistNetworkError, match="has not answered in 1 s"):
        dog._line.ask(lambda board: board.reasons())
    keeper.send_signal(signal.SIGCONT)
    asking = dog._line._asking
    assert asking is not None
    asking.join(timeout=60)
    assert dog._line.ask(lambda board: board.reasons()) == {1: "before"}


def test_two_threads_of_a_rank_may_ask_at_once() -> None:
    line, store = beats.Line(lambda: Board(store, 2)), dist.HashStore()
    with ThreadPoolExecutor(8) as threads:
        counts = list(threads.map(lambda _: line.ask(lambda board: board._store.add("n", 1)), range(400)))
    assert sorted(counts) == list(range(1, 401))
