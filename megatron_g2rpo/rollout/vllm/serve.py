# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false
# (vLLM has an environment of its own; tests/vllm/contract holds what is used of it.)
"""``megatron-g2rpo serve``: a vLLM server for ``vllm_server``, started as that engine needs it."""

from __future__ import annotations

import ipaddress
import json
import os
import sys
from collections.abc import Awaitable, Mapping
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware
from vllm.platforms import current_platform

from megatron_g2rpo.recipe import Policy
from megatron_g2rpo.rollout.vllm.http_client import API_KEY
from megatron_g2rpo.rollout.vllm.translate import engine_arguments
from megatron_g2rpo.rollout.vllm.weight_transfer import backend_of


def command(policy: Policy, host: str, port: int) -> tuple[list[str], dict[str, str]]:
    """Return the command that serves a recipe's policy, and the environment variables that it needs.

    The server waits for weights: those of the model directory are not read. Its API includes vLLM's development
    endpoints, which load weights and run methods by name; the server therefore listens on the loopback interface only,
    or requires a key.

    Args:
        policy: the recipe's ``policy`` section.
        host, port: address to listen on.

    Raises:
        ValueError: the host is not a loopback address, and there is no API key.
    """
    if not is_loopback(host) and not os.environ.get(API_KEY):
        raise ValueError(
            f"--host {host} can be reached from other machines: set {API_KEY}, here and where the trainer runs, to a "
            "key that the server will ask for"
        )
    asked = policy.generation.vllm_server_cfg.weight_transfer
    transfer = backend_of(asked, between_gpus=current_platform.is_cuda_alike())
    arguments = {
        **engine_arguments(policy, policy.precision),
        "load_format": "dummy",
        "weight_transfer_config": {"backend": transfer},
        "host": host,
        "port": port,
        "middleware": f"{__name__}.RequireKey",
        "enable_scale_out": True,  # `/inference/v1/generate`: tokens in, tokens out
    }
    environment = {
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_NO_USAGE_STATS": os.environ.get("VLLM_NO_USAGE_STATS", "1"),
        "VLLM_CPU_OMP_THREADS_BIND": os.environ.get("VLLM_CPU_OMP_THREADS_BIND", "nobind"),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    }
    options = [option for name, value in arguments.items() for option in _option(name, value)]
    return [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *options], environment


def is_loopback(host: str) -> bool:
    """Return whether an address can be reached from this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _option(name: str, value: Any) -> list[str]:
    dashed = name.replace("_", "-")
    if value is None:
        return []
    if isinstance(value, bool):
        return [f"--{dashed}" if value else f"--no-{dashed}"]
    if isinstance(value, list):
        return [f"--{dashed}", *map(str, value)]
    return [f"--{dashed}", json.dumps(value) if isinstance(value, Mapping) else str(value)]


class RequireKey(AuthenticationMiddleware):
    """Middleware that requires the key at every path but ``/health``.

    vLLM's own key check leaves the development endpoints open.
    """

    def __init__(self, app: ASGIApp) -> None:
        key = os.environ.get(API_KEY)
        super().__init__(app, tokens=[key] if key else [])

    def __call__(self, scope: Scope, receive: Receive, send: Send) -> Awaitable[None]:
        guarded = self.api_tokens and scope["type"] in ("http", "websocket") and scope["path"] != "/health"
        if guarded and not self.verify_token(Headers(scope=scope)):
            return JSONResponse(content={"error": "Unauthorized"}, status_code=401)(scope, receive, send)
        return self.app(scope, receive, send)
