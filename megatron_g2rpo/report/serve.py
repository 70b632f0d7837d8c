# SPDX-License-Identifier: Apache-2.0
"""``report --serve`` and ``--watch``: the page over HTTP on this machine alone, and anew when the run goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from megatron_g2rpo.report.metrics import METRICS_FILE, ReportError
from megatron_g2rpo.report.page import write_page
from megatron_g2rpo.report.run_directory import RECIPE_FILE

HOST = "127.0.0.1"
VERSION_PATH = "/version"
INTERVAL_S = 2.0  # between two looks at the files

State = tuple[tuple[str, int, int], ...]


def state_of(runs: Sequence[Path]) -> State:
    """Return name, size and time of change of what a page is made of; equal as long as nothing has changed."""
    files = (
        path
        for run in runs
        for path in (run / METRICS_FILE, run / RECIPE_FILE, *sorted((run / "rollouts").glob("*.parquet")))
    )
    found = []
    for path in files:
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        found.append((str(path), status.st_size, status.st_mtime_ns))
    return tuple(found)


def watch(
    runs: Sequence[Path],
    written: Callable[[Path], None],
    failed: Callable[[ReportError], None],
    *,
    version_url: str | None = None,
    stop: threading.Event | None = None,
    interval_s: float = INTERVAL_S,
) -> None:
    """Write the page whenever the runs' files have changed, until ``stop`` is set or Ctrl-C is pressed.

    Args:
        runs: the run directories.
        written: is told the path of each page.
        failed: is told why a page could not be written; the next change tries again.
        version_url: see ``page.write_page``.
        stop: ends the watch.
        interval_s: seconds between two looks at the files.
    """
    stop = stop or threading.Event()
    before = None
    while not stop.is_set():
        now = state_of(runs)
        if now != before:
            before = now
            try:
                written(write_page(runs, version_url=version_url))
            except ReportError as error:
                failed(error)
        stop.wait(interval_s)


def server_of(page: Path, port: int = 0) -> ThreadingHTTPServer:
    """Return a server of a page, on this machine's loopback alone; ``serve_forever`` starts it.

    Args:
        page: the file.
        port: the port; 0 takes a free one.

    Raises:
        ReportError: the port cannot be had; names it.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            # Of another host's page in the same browser, whose name was made to point here, this is none of.
            host = (self.headers.get("Host") or "").rpartition(":")[0]
            if host not in (HOST, "localhost"):
                self.send_error(HTTPStatus.FORBIDDEN, "open the page by the address that the command has printed")
            elif self.path == VERSION_PATH:
                self._answer(_version_of(page).encode(), "text/plain")
            elif self.path == "/":
                self._answer(page.read_bytes(), "text/html; charset=utf-8")
            else:
                self.send_error(HTTPStatus.NOT_FOUND)

        def _answer(self, content: bytes, kind: str) -> None:
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing: the page asks for its version every few seconds."""

    try:
        return ThreadingHTTPServer((HOST, port), Handler)
    except OSError as error:
        raise ReportError(
            f"port {port} of {HOST}: {error.strerror}; take another --port, or none for a free one"
        ) from error


def _version_of(page: Path) -> str:
    """What changes when the page does."""
    status = page.stat()
    return f"{status.st_mtime_ns}-{status.st_size}"


def serve(runs: Sequence[Path], port: int, say: Callable[[str], None], *, watching: bool) -> None:
    """Serve the page until Ctrl-C, and with ``watching`` write it anew when the runs' files change.

    Raises:
        ReportError: the port cannot be had; or see ``page.write_page``.
    """
    page = write_page(runs, version_url=VERSION_PATH if watching else None)
    server = server_of(page, port)
    threading.Thread(target=server.serve_forever, name="report server", daemon=True).start()
    say(f"the page of {', '.join(map(str, runs))}: http://{HOST}:{server.server_address[1]}/ (Ctrl-C ends it)")
    try:
        if watching:
            watch(runs, lambda path: None, lambda error: say(f"warning: {error}"), version_url=VERSION_PATH)
        while True:
            time.sleep(INTERVAL_S)
    except KeyboardInterrupt:
        pass
    finally:
        server.shutdown()
        server.server_close()
