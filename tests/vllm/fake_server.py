# SPDX-License-Identifier: Apache-2.0
"""A small HTTP server in the place of vLLM's, that answers, refuses, stalls and dies as it is told."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

VERSION = "0123456789ab-7"
GENERATE = "/inference/v1/generate"
# What a fake server does with a prompt: HTTP status and body, or None to close the connection without an answer.
Reply = tuple[int, Any] | None


def choices(prompt: int, *versions: str) -> dict[str, Any]:
    """One sample whose token is the prompt's number."""
    spans = [{"version": version, "start": 0} for version in versions]
    return {"choices": [{"index": 0, "token_ids": [prompt], "weight_versions": spans}]}


def fine(_: Fake, prompt: int) -> Reply:
    return 200, choices(prompt, VERSION)


class Fake:
    """A server on a port of its own.

    Args:
        answer: to a prompt, given its number.
        port: where to listen; 0 is any free port.

    Attributes:
        health: HTTP status of ``/health`` and of whatever else is asked but prompts.
        asked: when which prompt came: (time, prompt).
        keys: every ``Authorization`` that came, with its path.
        posted: paths of other requests.
        most: prompts that were under way at once, at most.
        gone: set when it was killed.
    """

    def __init__(self, answer: Callable[[Fake, int], Reply] = fine, port: int = 0) -> None:
        self.answer = answer
        self.health: int | Callable[[], int] = 200
        self.asked: list[tuple[float, int]] = []
        self.keys: list[tuple[str, str | None]] = []
        self.posted: list[str] = []
        self.most = self._now = 0
        self.gone = threading.Event()
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._server = _HTTPServer(("127.0.0.1", port), self._handler())
        self.port = self._server.server_address[1]
        self.address = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    @property
    def prompts(self) -> list[int]:
        return [prompt for _, prompt in self.asked]

    def kill(self) -> None:
        """Close the port and every connection, with whatever is under way."""
        if not self.gone.is_set():
            self.gone.set()
            self._server.shutdown()
            self._server.server_close()
            with self._lock:
                for connection in self._sockets:
                    _close(connection)

    def reply(self, prompt: int) -> Reply:
        with self._lock:
            self.asked.append((time.monotonic(), prompt))
            self._now += 1
            self.most = max(self.most, self._now)
        try:
            return self.answer(self, prompt)
        finally:
            with self._lock:
                self._now -= 1

    def _handler(fake: Fake) -> type[BaseHTTPRequestHandler]:
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def setup(self) -> None:
                with fake._lock:
                    fake._sockets.add(self.request)
                super().setup()

            def do_GET(self) -> None:
                fake.keys.append((self.path, self.headers["Authorization"]))
                self._send((fake.health() if callable(fake.health) else fake.health, {}))

            def do_POST(self) -> None:
                fake.keys.append((self.path, self.headers["Authorization"]))
                body = self.rfile.read(int(self.headers["Content-Length"] or 0))
                if self.path == GENERATE:
                    self._send(fake.reply(json.loads(body)["token_ids"][0]))
                else:
                    fake.posted.append(self.path)
                    self._send((fake.health, {}))

            def _send(self, reply: Reply) -> None:
                if reply is None:
                    self.close_connection = True
                    _close(self.request)
                    return
                status, content = reply
                text = content.encode() if isinstance(content, str) else json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: object) -> None: ...

        return Handler


class _HTTPServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128  # no connection waits for the kernel: times are the client's own

    def handle_error(self, *_: object) -> None:
        """A connection that the client gave up, or that was killed: both are meant."""


def _close(connection: socket.socket) -> None:
    try:
        connection.shutdown(socket.SHUT_RDWR)
    except OSError:
        return  # it was closed already
