# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false
# (vLLM has an environment of its own; tests/vllm/contract holds what is used of it.)
"""A client of several vLLM servers: it balances prompts over them, updates all their weights, and notices lost ones.

A server is *lost* when it does not answer its health check, when requests keep failing on it, or when it answers with
weights other than the current ones. The other servers repeat the requests that it had in progress. It gets no further
requests until the next weight update, which tries every address again.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx

from megatron_g2rpo import progress
from megatron_g2rpo.recipe import VllmServerConfig
from megatron_g2rpo.rollout.base import EngineUnavailable

API_KEY = "MEGATRON_G2RPO_API_KEY"
# Failed health checks in a row after which a server counts as lost, and the first pause before a second try, seconds.
_HEALTH_CHECKS = 3
_PAUSE = 0.5

_logger = logging.getLogger(__name__)


class ServerLost(RuntimeError):
    """A server cannot be used any more; the message says why."""


@dataclass(eq=False)
class Server:
    """One server.

    Attributes:
        address: its base address, ``http://HOST:PORT``.
        lost: the reason why it is not used; None while it is used.
        under_way: number of requests that it has not answered yet.
    """

    address: str
    lost: str | None = None
    under_way: int = 0


@dataclass(frozen=True)
class Request:
    """The request for one prompt's group of responses.

    Attributes:
        name: name of the prompt in error messages.
        body: JSON body of the request to ``/inference/v1/generate``.
    """

    name: str
    body: dict[str, Any] = field(repr=False)


class Servers:
    """The servers of a run, as one process sees them.

    Args:
        options: the recipe's section with addresses, timeouts and retries.
        first: index of the server that this process prefers among equally busy ones; give each rank its own.
    """

    def __init__(self, options: VllmServerConfig, first: int = 0) -> None:
        self._options = options
        everyone = [Server(address) for address in options.addresses]
        turn = first % len(everyone)
        self.everyone = everyone[turn:] + everyone[:turn]
        key = os.environ.get(API_KEY)
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    @property
    def live(self) -> list[Server]:
        """The servers that are in use."""
        return [server for server in self.everyone if server.lost is None]

    def lose(self, server: Server, why: str) -> None:
        """Mark a server as lost, so that it is not used any more."""
        if server.lost is None:
            server.lost = why
            _logger.warning("rollout server %s is lost: %s", server.address, why)

    def unavailable(self) -> EngineUnavailable:
        """Return the error to raise when no server is left."""
        causes = "".join(f"\n  {server.address}: {server.lost}" for server in self.everyone)
        return EngineUnavailable(
            f"no rollout server is left (policy.generation.vllm_server_cfg.addresses):{causes}",
            wait=self._options.on_no_server == "wait",
        )

    # -- control ------------------------------------------------------------------------------------------------

    def find(self) -> None:
        """Ask every address for its health; the servers that answer are used from now on."""

        def ask(server: Server) -> None:
            for attempt in range(_HEALTH_CHECKS):  # one slow answer of a busy machine is no loss
                try:
                    self.request(server, "GET", "/health", timeout=self._options.heartbeat_s)
                except ServerLost as error:
                    server.lost = str(error)
                    time.sleep(_PAUSE * 2**attempt)
                else:
                    server.lost = None
                    return

        _at_once(ask, self.everyone)

    def use(self, addresses: Iterable[str]) -> None:
        """Use these servers and no others."""
        chosen = set(addresses)
        for server in self.everyone:
            server.lost = None if server.address in chosen else "it was lost to another process of the run"

    def request(
        self, server: Server, method: str, path: str, *, json: Any = None, timeout: float | None = None
    ) -> httpx.Response:
        """Send one control request (not a generation) to a server and return its response.

        Raises:
            ServerLost: the server could not be reached, or refused the request.
        """
        try:
            response = httpx.request(
                method,
                server.address + path,
                json=json,
                headers=self._headers,
                timeout=timeout or self._options.request_timeout_s,
            )
        except httpx.HTTPError as error:
            raise ServerLost(f"{method} {path}: {_said(error)}") from error
        if response.is_error:
            raise ServerLost(f"{method} {path}: {_refusal(response)}")
        return response

    def post(self, path: str, json: Any = None) -> None:
        """Post the same request to all live servers at once; servers that fail are lost.

        Raises:
            EngineUnavailable: all servers failed.
        """
        self.each(lambda server: self.request(server, "POST", path, json=json))

    def each(self, ask: Callable[[Server], Any]) -> None:
        """Call a function for all live servers at once; servers whose call raises ``ServerLost`` are lost.

        Raises:
            EngineUnavailable: the calls of all servers raised.
        """

        def attempt(server: Server) -> None:
            try:
                ask(server)
            except ServerLost as error:
                self.lose(server, str(error))

        _at_once(attempt, self.live)
        if not self.live:
            raise self.unavailable()

    # -- generation ---------------------------------------------------------------------------------------------

    def generate(
        self,
        requests: Sequence[Request],
        version: str,
        finish: Callable[[int, list[dict[str, Any]]], None] | None = None,
    ) -> list[list[dict[str, Any]]]:
        """Return the choices (sampled responses) of every request, in the order of the requests.

        Args:
            requests: the requests to send.
            version: version of the weights that the answers must come from.
            finish: is called with the index of each request and its choices, as soon as they are there; None for
                nothing.

        Raises:
            EngineUnavailable: no server is left.
            RuntimeError: a server refuses a request as wrong; names the prompt.
        """
        try:
            return asyncio.run(_Generation(self, self._options, self._headers, version).run(requests, finish))
        except ExceptionGroup as group:
            raise group.exceptions[0] from None


class _Generation:
    """The requests of one call of ``Servers.generate`` while they are in progress."""

    def __init__(self, servers: Servers, options: VllmServerConfig, headers: dict[str, str], version: str) -> None:
        self._servers, self._options, self._headers, self._version = servers, options, headers, version
        self._slots = asyncio.Semaphore(options.max_concurrent_requests)
        self._gone = {server: asyncio.Event() for server in servers.live}

    async def run(
        self, requests: Sequence[Request], finish: Callable[[int, list[dict[str, Any]]], None] | None
    ) -> list[list[dict[str, Any]]]:
        async def answered(index: int, request: Request) -> list[dict[str, Any]]:
            choices = await self._answer(request)
            if finish is not None:
                finish(index, choices)
            return choices

        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        timeout = httpx.Timeout(self._options.request_timeout_s)
        async with httpx.AsyncClient(headers=self._headers, limits=limits, timeout=timeout) as self._http:
            watches = [asyncio.create_task(self._watch(server)) for server in self._gone]
            try:
                async with asyncio.TaskGroup() as group:
                    tasks = [group.create_task(answered(*numbered)) for numbered in enumerate(requests)]
            finally:
                for watch in watches:
                    watch.cancel()
        return [task.result() for task in tasks]

    async def _watch(self, server: Server) -> None:
        """Mark a server as lost once it stops answering, even if its connections stay open."""
        failed = 0
        while failed < _HEALTH_CHECKS:
            await asyncio.sleep(self._options.heartbeat_s)
            failed = 0 if await self._healthy(server) else failed + 1
            if not failed:
                progress.advance()  # what a healthy server does not answer has a time limit of its own
        self._lose(server, f"{failed} health checks in a row failed")

    async def _healthy(self, server: Server) -> bool:
        try:
            response = await self._http.get(f"{server.address}/health", timeout=self._options.heartbeat_s)
        except httpx.HTTPError:
            return False
        return response.is_success

    def _lose(self, server: Server, why: str) -> None:
        self._servers.lose(server, why)
        self._gone[server].set()

    async def _answer(self, request: Request) -> list[dict[str, Any]]:
        """Send a request to the least busy server, and to the next one if that server is lost."""
        async with self._slots:
            while True:
                live = self._servers.live
                if not live:
                    raise self._servers.unavailable()
                server = min(live, key=lambda server: server.under_way)
                server.under_way += 1
                try:
                    return await self._ask(server, request)
                except ServerLost as error:
                    self._lose(server, str(error))
                finally:
                    server.under_way -= 1

    async def _ask(self, server: Server, request: Request) -> list[dict[str, Any]]:
        why = ""
        for attempt in range(self._options.retries + 1):
            answer = await self._try(server, request)
            if isinstance(answer, list):
                return answer
            why = answer
            if not await self._healthy(server):
                raise ServerLost(f"{why}, and its health check failed")
            _logger.warning("rollout server %s: %s (try %d)", server.address, why, attempt + 1)
            if attempt < self._options.retries:
                await asyncio.sleep(_PAUSE * 2**attempt)
        raise ServerLost(f"{self._options.retries + 1} tries of one request failed, the last one with: {why}")

    async def _try(self, server: Server, request: Request) -> list[dict[str, Any]] | str:
        """Return the choices that a server gives, or what went wrong."""
        post = asyncio.create_task(self._http.post(f"{server.address}/inference/v1/generate", json=request.body))
        gone = asyncio.create_task(self._gone[server].wait())
        try:
            await asyncio.wait({post, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not post.done():
                raise ServerLost(server.lost or "it was lost")
            response = post.result()
        except httpx.TimeoutException as error:
            raise ServerLost(f"no answer within {self._options.request_timeout_s:g} s ({_said(error)})") from error
        except httpx.HTTPError as error:
            return _said(error)
        finally:
            for task in (post, gone):
                task.cancel()
        if response.is_server_error or response.status_code == httpx.codes.TOO_MANY_REQUESTS:
            return _refusal(response)
        if response.is_error:
            raise RuntimeError(f"{request.name}: {server.address} refuses it: {_refusal(response)}")
        choices = response.json()["choices"]
        versions = {span["version"] for choice in choices for span in choice["weight_versions"] or []}
        if versions != {self._version}:
            raise ServerLost(f"it answers with weights {sorted(versions)} instead of {self._version}")
        return choices


def _at_once(call: Callable[[Server], None], servers: Sequence[Server]) -> None:
    with ThreadPoolExecutor(max_workers=max(len(servers), 1)) as pool:
        list(pool.map(call, servers))


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".rstrip(": ")


def _refusal(response: httpx.Response) -> str:
    text = f"HTTP {response.status_code}: {response.text[:500]}"
    return f"{text} (set {API_KEY} to the servers' key)" if response.status_code == 401 else text
