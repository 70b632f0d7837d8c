# SPDX-License-Identifier: Apache-2.0
"""``megatron-g2rpo serve`` against vLLM's own argument parser, engine configuration and application.

The application is the one that the command would serve, in this process and without an engine behind it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.routing import WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocket, WebSocketDisconnect
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.serve.dev.server_info import api_router as server_info

from megatron_g2rpo.rollout.vllm import serve
from megatron_g2rpo.rollout.vllm.http_client import API_KEY, Server
from megatron_g2rpo.rollout.vllm.serve import RequireKey, command
from megatron_g2rpo.rollout.vllm.server_engine import VllmServerEngine
from megatron_g2rpo.rollout.vllm.translate import num_logprobs
from tests.vllm import common
from tests.vllm.application import parse, serving

KEY = "open sesame"
BEARER = {"Authorization": f"Bearer {KEY}"}
# What loads weights, runs methods by name, or generates.
GUARDED = ("/collective_rpc", "/inference/v1/generate", "/update_weights", "/pause", "/sleep", "/reset_prefix_cache")


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(API_KEY, raising=False)


@pytest.fixture(scope="module")
def locked_once() -> Iterator[TestClient]:
    with serving(parse(), KEY) as client:
        yield client


@pytest.fixture
def locked(locked_once: TestClient) -> TestClient:
    """A server with a key, which nobody has asked anything yet."""
    locked_once.app.state.engine_client.reset_mock()
    return locked_once


def post(client: TestClient, path: str, headers: dict[str, str] | None = None) -> int:
    bodies = {
        "/collective_rpc": {"method": "sleep"},
        "/inference/v1/generate": {"token_ids": [1], "sampling_params": {}},
        "/update_weights": {"update_info": {}},
    }
    return client.post(path, json=bodies.get(path), headers=headers).status_code


def reached(path: str) -> int:
    """The status of a request that gets through: there is nothing behind the token endpoint."""
    return 501 if path == "/inference/v1/generate" else 200


# -- the command ------------------------------------------------------------------------------------------------


def test_vllm_takes_the_command_and_reads_what_the_recipe_asked_for():
    section = "policy.generation"
    arguments = parse(
        f"{section}.batch_size=24",
        f"{section}.vllm_cfg.images_per_prompt=3",
        f"{section}.vllm_cfg.gpu_memory_utilization=0.25",
        f"{section}.vllm_cfg.enforce_eager=false",
        "policy.max_total_sequence_length=384",
    )
    engine = vars(AsyncEngineArgs.from_cli_args(arguments))
    expected = {
        "model": str(common.POLICY),
        "dtype": "float32",
        "max_model_len": 384,
        "max_num_seqs": 24,
        "tensor_parallel_size": 1,
        "gpu_memory_utilization": 0.25,
        "kv_cache_memory_bytes": 2**26,
        "skip_mm_profiling": True,
        "enforce_eager": False,
        "limit_mm_per_prompt": {"image": 3, "video": 0},
        "logprobs_mode": "processed_logprobs",
        "mm_device_do_normalize": False,
        "generation_config": "vllm",
        "load_format": "dummy",
    }
    assert {name: engine[name] for name in expected} == expected
    assert engine["weight_transfer_config"].backend == "files"
    assert (arguments.host, arguments.port, arguments.enable_scale_out) == ("127.0.0.1", 8123, True)
    assert arguments.middleware == ["megatron_g2rpo.rollout.vllm.serve.RequireKey"]


def test_a_cache_that_is_not_sized_is_left_to_vllm():
    engine = AsyncEngineArgs.from_cli_args(parse("policy.generation.vllm_cfg.kv_cache_memory_bytes=null"))
    assert (engine.kv_cache_memory_bytes, engine.skip_mm_profiling) == (None, False)


@pytest.mark.parametrize(("asked", "backend"), [("auto", "files"), ("files", "files"), ("broadcast", "nccl")])
def test_weights_come_as_the_recipe_says_and_by_files_on_a_cpu(asked, backend):
    arguments = parse(f"policy.generation.vllm_server_cfg.weight_transfer={asked}")
    assert arguments.weight_transfer_config.backend == backend


def test_between_gpus_weights_are_broadcast(monkeypatch):
    monkeypatch.setattr(serve, "current_platform", SimpleNamespace(is_cuda_alike=lambda: True))
    assert parse().weight_transfer_config.backend == "nccl"


def test_vllm_kwargs_of_every_kind_pass_through():
    further = (
        "{max_num_batched_tokens: 2048, enable_prefix_caching: false, enable_log_requests: true, kv_cache_dtype: auto, "
        "hf_overrides: {tie_word_embeddings: true}, cudagraph_capture_sizes: [1, 2, 4], revision: null}"
    )
    engine = AsyncEngineArgs.from_cli_args(parse(f"policy.generation.vllm_cfg.vllm_kwargs={further}"))
    assert engine.max_num_batched_tokens == 2048
    assert engine.enable_prefix_caching is False
    assert engine.enable_log_requests is True
    assert engine.hf_overrides == {"tie_word_embeddings": True}
    assert engine.cudagraph_capture_sizes == [1, 2, 4]
    assert engine.kv_cache_dtype == "auto"
    assert engine.revision is None


def test_vllm_kwargs_that_vllm_does_not_know_end_the_command(capsys):
    with pytest.raises(SystemExit):
        parse("policy.generation.vllm_cfg.vllm_kwargs={fly: 3}")
    assert "unrecognized arguments: --fly" in capsys.readouterr().err


def test_the_environment_opens_the_endpoints_and_sends_nothing_home(monkeypatch):
    for name in ("VLLM_NO_USAGE_STATS", "VLLM_CPU_OMP_THREADS_BIND"):
        monkeypatch.delenv(name, raising=False)
    _, environment = command(common.load_recipe().policy, "127.0.0.1", 8123)
    assert environment["VLLM_SERVER_DEV_MODE"] == environment["VLLM_NO_USAGE_STATS"] == "1"
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0-3")
    _, environment = command(common.load_recipe().policy, "127.0.0.1", 8123)
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "0-3", "a user's own choice stays"


# -- what the trainer checks before it gives weights ------------------------------------------------------------


class OneServer:
    """``Servers`` with vLLM's application in the place of a server."""

    def __init__(self, client: TestClient) -> None:
        self._client = client

    def request(self, server: Server, method: str, path: str) -> Any:
        return self._client.request(method, path).raise_for_status()


def check(arguments: argparse.Namespace, monkeypatch: pytest.MonkeyPatch, top_k: int | None = None) -> None:
    """What the engine thinks of a server with these arguments, by vLLM's own account of its configuration."""
    monkeypatch.setattr(server_info, "_get_system_env_info_cached", dict)  # asks pip and nvidia-smi, for ten seconds
    engine = object.__new__(VllmServerEngine)
    with serving(arguments) as client:
        client.app.state.vllm_config = AsyncEngineArgs.from_cli_args(arguments).create_engine_config()
        engine._servers, engine._method = OneServer(client), "files"  # type: ignore[assignment]
        engine._num_logprobs = num_logprobs(top_k)
        engine._check(Server("http://127.0.0.1:8123"))


def test_the_trainer_accepts_a_server_that_was_started_by_the_command(monkeypatch):
    check(parse(), monkeypatch)


@pytest.mark.parametrize("of_server", [30, 40])
def test_a_server_gives_as_many_logprobs_as_a_recipe_with_top_k_needs(monkeypatch, of_server):
    check(parse(f"policy.generation.top_k={of_server}"), monkeypatch, top_k=30)


@pytest.mark.parametrize("override", ["policy.generation.top_k=20", "policy.generation.top_k=null"])
def test_a_server_that_gives_fewer_logprobs_than_top_k_needs_is_refused(monkeypatch, override):
    with pytest.raises(ValueError, match=r"'max_logprobs': \d+\}, but must have .*'max_logprobs': 62"):
        check(parse(override), monkeypatch, top_k=30)


@pytest.mark.parametrize(
    ("option", "found"),
    [
        (("--logprobs-mode", "raw_logprobs"), "'logprobs_mode': 'raw_logprobs'"),
        (("--mm-device-do-normalize",), "'mm_device_do_normalize': True"),
        (("--weight-transfer-config", '{"backend": "nccl"}'), "'weight transfer': 'nccl'"),
    ],
)
def test_the_trainer_refuses_a_server_that_was_started_otherwise(monkeypatch, option, found):
    """Negative: each would change log-probabilities, or pixels, without a word."""
    with pytest.raises(ValueError, match=rf"^http://127.0.0.1:8123 was started with .*{found}.* but must have"):
        check(parse(extra=option), monkeypatch)


# -- who may ask ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_on_loopback_no_key_is_needed(host):
    assert parse(host=host).host == host


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.4", "node-7", "localhost.example.org", ""])
def test_beyond_loopback_a_key_is_needed(monkeypatch, host):
    with pytest.raises(ValueError, match=rf"^--host {host} can be reached from other machines: set {API_KEY}"):
        command(common.load_recipe().policy, host, 8123)
    monkeypatch.setenv(API_KEY, KEY)
    assert command(common.load_recipe().policy, host, 8123)


def test_the_key_is_in_no_argument(monkeypatch):
    """Everyone on a machine can read the arguments of a process."""
    monkeypatch.setenv(API_KEY, KEY)
    arguments, environment = command(common.load_recipe().policy, "0.0.0.0", 8123)
    assert KEY not in " ".join([*arguments, *environment.values()])


@pytest.mark.parametrize("path", GUARDED)
def test_with_a_key_set_nobody_gets_in_without_it(locked, path):
    for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": KEY}, {"Authorization": f"Basic {KEY}"}):
        assert post(locked, path, headers) == 401, headers
    assert not locked.app.state.engine_client.mock_calls


@pytest.mark.parametrize("path", GUARDED)
def test_with_the_key_everything_is_reached(locked, path):
    assert post(locked, path, BEARER) == reached(path)
    assert bool(locked.app.state.engine_client.mock_calls) == (reached(path) == 200)


def test_health_is_open_and_nothing_else_is(locked):
    routes = [(route.path, method) for route in locked.app.routes for method in getattr(route, "methods", None) or ()]
    assert ("/collective_rpc", "POST") in routes, "the development endpoints must be there, or the check is empty"
    open_ones = {path for path, method in routes if locked.request(method, path).status_code != 401}
    assert open_ones == {"/health"}
    assert {locked.options(path).status_code for path in GUARDED} == {401}


@pytest.mark.parametrize("path", ["/health/", "/health/../collective_rpc", "/health%2f..%2fcollective_rpc", "/Health"])
def test_a_path_that_looks_like_health_reaches_nothing(locked, path):
    assert locked.post(path, json={"method": "sleep"}).status_code == 401
    assert not locked.app.state.engine_client.mock_calls


def test_without_a_key_everything_passes():
    with serving(parse()) as client:
        assert {path: post(client, path) for path in GUARDED} == {path: reached(path) for path in GUARDED}


def test_vllms_own_key_leaves_the_development_endpoints_open():
    """Negative: why there is ``RequireKey``. If vLLM ever guards them, it can go."""
    arguments = parse(extra=("--api-key", KEY))
    arguments.middleware = []
    with serving(arguments) as client:
        assert post(client, "/inference/v1/generate") == 401
        assert post(client, "/collective_rpc") == post(client, "/update_weights") == 200
        client.app.state.engine_client.collective_rpc.assert_called_once()


def test_websockets_need_the_key_too(monkeypatch):
    monkeypatch.setenv(API_KEY, KEY)

    async def greet(socket: WebSocket) -> None:
        await socket.accept()
        await socket.send_text("hello")
        await socket.close()

    app = Starlette(routes=[WebSocketRoute("/v1/realtime", greet)], middleware=[Middleware(RequireKey)])
    client = TestClient(app)
    with client.websocket_connect("/v1/realtime", headers=BEARER) as socket:
        assert socket.receive_text() == "hello"
    with pytest.raises(WebSocketDisconnect), client.websocket_connect("/v1/realtime"):
        pass
