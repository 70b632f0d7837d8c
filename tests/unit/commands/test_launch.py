# SPDX-License-Identifier: Apache-2.0
"""Claims: of a failed job, the cause is reported and not what it led to; a user's error comes without a traceback."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch.distributed.run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from megatron_g2rpo import progress
from megatron_g2rpo.commands import launch
from megatron_g2rpo.train.run.watchdog import HangError, PeerLostError


def failure(path: Path, rank: int, exitcode: int = 1) -> ProcessFailure:
    return ProcessFailure(local_rank=rank, pid=100 + rank, exitcode=exitcode, error_file=str(path / f"{rank}.json"))


def message_of(monkeypatch: pytest.MonkeyPatch, *failures: ProcessFailure) -> str:
    def fail(arguments: list[str]) -> None:
        assert arguments[-3:] == ["megatron_g2rpo.cli", "train", "recipe.yaml"]
        raise ChildFailedError("job", {failure.local_rank: failure for failure in failures})

    monkeypatch.setattr(torch.distributed.run, "main", fail)
    with pytest.raises(launch.JobError) as raised:
        launch.launch(2, ["train", "recipe.yaml"])
    return str(raised.value)


@pytest.fixture
def as_rank(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """This process as rank 1 of a launched job, that does not end with ``os._exit``."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MEGATRON_G2RPO_LAUNCHED", "1")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "1.json"))
    monkeypatch.setattr(launch.os, "_exit", lambda code: (_ for _ in ()).throw(SystemExit(code)))


def end(error: BaseException) -> int:
    """Exit code of a process that an error ends; raised first, because that is what gives it a traceback."""
    try:
        raise error
    except type(error):
        with pytest.raises(SystemExit) as ended:
            launch.end(error)
    code = ended.value.code
    assert isinstance(code, int)
    return code


@pytest.mark.usefixtures("as_rank")
def test_the_rank_that_failed_first_is_reported(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert end(ValueError("sample 7 is bad")) == 1
    assert capsys.readouterr().err == "", "the launcher prints it"
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "0.json"))
    assert end(RuntimeError("Connection closed by peer")) == 1
    record = json.loads((tmp_path / "0.json").read_text())
    assert "Traceback" in record["message"]
    assert message_of(monkeypatch, failure(tmp_path, 0), failure(tmp_path, 1)) == "rank 1: sample 7 is bad"
    assert "Connection closed" in message_of(monkeypatch, failure(tmp_path, 0))


@pytest.mark.usefixtures("as_rank")
def test_a_rank_that_died_without_a_word_is_the_cause(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    end(RuntimeError("Connection closed by peer"))
    killed, ended, peer = failure(tmp_path, 0, -9), failure(tmp_path, 2, -15), failure(tmp_path, 1)
    assert message_of(monkeypatch, killed, peer) == (
        "rank 0 ended without a message (Signal 9 (SIGKILL) received by PID 100)"
    )
    # torchrun ends the others with SIGTERM: that is no cause.
    assert message_of(monkeypatch, peer, ended).startswith("rank 1: Traceback")
    assert message_of(monkeypatch, failure(tmp_path, 0, 3)) == "rank 0 ended without a message (exit code 3)"


@pytest.mark.usefixtures("as_rank")
def test_an_interrupted_rank_leaves_without_a_message(tmp_path: Path) -> None:
    assert end(KeyboardInterrupt()) == 130
    assert not (tmp_path / "1.json").exists()


@pytest.mark.usefixtures("as_rank")
def test_under_another_s_torchrun_a_rank_prints_its_own_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MEGATRON_G2RPO_LAUNCHED")
    assert end(ValueError("sample 7 is bad")) == 1
    assert capsys.readouterr().err == "error: rank 1: sample 7 is bad\n"
    assert not (tmp_path / "1.json").exists()


def test_alone_a_process_prints_its_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert end(ValueError("sample 7 [bad] is bad")) == 1
    assert capsys.readouterr().err == "error: sample 7 [bad] is bad\n"
    monkeypatch.setenv("MEGATRON_G2RPO_TRACEBACK", "1")
    assert end(ValueError("sample 7 is bad")) == 1
    assert "ValueError: sample 7 is bad" in capsys.readouterr().err


@pytest.mark.usefixtures("as_rank")
def test_what_follows_from_another_ranks_end_is_no_cause(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever the order in which their messages were written, and though NCCL aborts its process."""
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "0.json"))
    end(PeerLostError("rank 1 has ended"))
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "1.json"))
    end(ValueError("sample 7 is bad"))
    lost, bad, aborted = failure(tmp_path, 0), failure(tmp_path, 1), failure(tmp_path, 2, -6)
    assert message_of(monkeypatch, lost, bad, aborted) == "rank 1: sample 7 is bad"
    assert message_of(monkeypatch, lost, aborted).startswith("rank 2 ended without a message (Signal 6")


@pytest.mark.usefixtures("as_rank")
def test_the_verdict_on_a_job_that_hangs_comes_before_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A stopped rank is killed by torchrun in the end: that is no cause."""
    end(HangError("no progress for 20 s: rank 0 is stopped"))
    assert message_of(monkeypatch, failure(tmp_path, 0, -9), failure(tmp_path, 1)) == (
        "no progress for 20 s: rank 0 is stopped"
    )


def test_of_a_rank_that_died_without_a_word_its_last_place_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(arguments: list[str]) -> None:
        monkeypatch.setenv("RANK", "3")
        progress.enter("update", step=17)  # what the rank does, in the folder that the launcher has named
        raise ChildFailedError("job", {3: failure(tmp_path, 3, -9)})

    monkeypatch.setattr(torch.distributed.run, "main", fail)
    with pytest.raises(launch.JobError) as raised:
        launch.launch(4, ["train", "recipe.yaml"])
    where = f"on {socket.gethostname()}, step 17, phase update"
    assert str(raised.value).startswith(f"rank 3 ({where}) ended without a message (Signal 9")
