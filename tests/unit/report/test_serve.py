# SPDX-License-Identifier: Apache-2.0
"""Claim: a served page is this machine's alone, and a watched one is written anew when the run goes on, not before."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from megatron_g2rpo.cli import app
from megatron_g2rpo.report import serve as serving
from megatron_g2rpo.report.metrics import ReportError
from megatron_g2rpo.report.serve import VERSION_PATH, server_of, state_of, watch
from tests.common.recorded_run import write_recorded_run


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """A page, and the port that it is served on."""
    page = tmp_path / "report.html"
    page.write_text("<p>first")
    server = server_of(page)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    assert server.server_address[0] == "127.0.0.1"
    yield page, server.server_address[1]
    server.shutdown()
    server.server_close()


def get(port: int, path: str, host: str = "localhost") -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", path, headers={"Host": f"{host}:{port}"})
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


def test_the_page_and_its_version_are_served_and_nothing_else(served: tuple[Path, int]) -> None:
    page, port = served
    assert get(port, "/") == (200, "<p>first")
    _, before = get(port, VERSION_PATH)
    page.write_text("<p>the second")
    assert get(port, "/") == (200, "<p>the second")
    assert get(port, VERSION_PATH)[1] != before
    for path in ("/report.html", "/../metrics.jsonl", "//etc/passwd"):
        assert get(port, path)[0] == 404


def test_another_name_of_this_machine_is_refused(served: tuple[Path, int]) -> None:
    assert get(served[1], "/", host="evil.example")[0] == 403


def test_a_watched_page_is_written_when_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = write_recorded_run(tmp_path / "run", steps=2)
    stop, looks, written = threading.Event(), [], []

    def wait(seconds: float) -> bool:
        looks.append(len(written))
        if len(looks) == 3:
            with (run / "metrics.jsonl").open("a") as file:
                file.write('{"step": 3, "train/reward": 1.0}\n')
        if len(looks) == 6:
            stop.set()
        return stop.is_set()

    monkeypatch.setattr(stop, "wait", wait)
    monkeypatch.setattr(serving, "write_page", lambda runs, **_: runs[0])
    watch([run], written.append, lambda error: pytest.fail(str(error)), stop=stop)
    assert looks == [1, 1, 1, 2, 2, 2]


def test_what_cannot_be_written_now_is_said_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop, said = threading.Event(), []

    def fail(runs: list[Path], **_: object) -> Path:
        raise ReportError("no run")

    monkeypatch.setattr(serving, "write_page", fail)
    monkeypatch.setattr(stop, "wait", lambda seconds: stop.set())
    watch([tmp_path], lambda path: pytest.fail(str(path)), lambda error: said.append(str(error)), stop=stop)
    assert said == ["no run"]


def test_the_state_of_a_run_changes_with_each_of_its_files(tmp_path: Path) -> None:
    run = write_recorded_run(tmp_path / "run", steps=2)
    states = [state_of([run])]
    for path in (run / "metrics.jsonl", run / "recipe.yaml", run / "rollouts" / "step_000002.parquet"):
        path.write_bytes(path.read_bytes() + b"\n")
        states.append(state_of([run]))
    (run / "rollouts" / "step_000001.parquet").unlink()
    states.append(state_of([run]))
    assert len(set(states)) == 5
    assert state_of([run]) == states[-1]


def test_a_port_that_is_taken_is_named(served: tuple[Path, int]) -> None:
    page, port = served
    with pytest.raises(ReportError, match=rf"^port {port} of 127\.0\.0\.1: .*--port"):
        server_of(page, port)


def test_a_port_without_a_server_is_refused(tmp_path: Path) -> None:
    answer = CliRunner().invoke(app, ["report", str(tmp_path), "--port", "8123"])
    assert answer.exit_code == 2
    assert "--port is that of --serve" in answer.output
