# SPDX-License-Identifier: Apache-2.0
"""vLLM's HTTP application as ``megatron-g2rpo serve`` starts it, in this process and without an engine behind it."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import create_autospec

import httpx
import pytest
from starlette.testclient import TestClient
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM

from megatron_g2rpo.recipe import VllmServerConfig
from megatron_g2rpo.rollout.vllm.http_client import API_KEY, Server, ServerLost, Servers
from megatron_g2rpo.rollout.vllm.serve import command
from tests.vllm import common


def parse(*overrides: str, host: str = "127.0.0.1", extra: tuple[str, ...] = ()) -> argparse.Namespace:
    """What ``python -m vllm.entrypoints.openai.api_server`` makes of the command."""
    (_, flag, module, *options), _ = command(common.load_recipe(*overrides).policy, host, 8123)
    assert (flag, module) == ("-m", "vllm.entrypoints.openai.api_server")
    arguments = make_arg_parser(FlexibleArgumentParser()).parse_args([*options, *extra])
    validate_parsed_serve_args(arguments)
    return arguments


@contextmanager
def serving(arguments: argparse.Namespace, key: str | None = None) -> Iterator[TestClient]:
    """The application in the environment of the command; its engine has vLLM's signatures and does nothing."""
    _, environment = command(common.load_recipe().policy, "127.0.0.1", 8123)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {**environment, **({API_KEY: key} if key else {})}.items():
            patch.setenv(name, value)
        app = build_app(arguments, ("generate",))
        app.state.engine_client = create_autospec(AsyncLLM, instance=True)
        app.state.serving_tokens = None
        yield TestClient(app, raise_server_exceptions=False)


class InProcess(Servers):
    """``Servers`` whose addresses are applications in this process.

    Args:
        options: of the recipe.
        clients: by address.
    """

    def __init__(self, options: VllmServerConfig, clients: Mapping[str, TestClient]) -> None:
        super().__init__(options)
        self._clients = clients

    def request(
        self, server: Server, method: str, path: str, *, json: Any = None, timeout: float | None = None
    ) -> httpx.Response:
        response = self._clients[server.address].request(method, path, json=json)
        if response.is_error:
            raise ServerLost(f"{method} {path}: HTTP {response.status_code}: {response.text}")
        return response
