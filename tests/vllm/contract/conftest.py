# SPDX-License-Identifier: Apache-2.0
"""Two servers: vLLM's HTTP application without an engine, and the client that speaks to both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_g2rpo.rollout.vllm import reload, server_engine
from tests.vllm.application import InProcess, parse, serving
from tests.vllm.contract.updates import ADDRESSES, VERSION, settings


@pytest.fixture(scope="module")
def applications() -> Iterator[dict[str, Any]]:
    arguments = parse()
    with ExitStack() as stack:
        yield {address: stack.enter_context(serving(arguments)) for address in ADDRESSES}


@pytest.fixture
def engines(applications) -> list[Any]:
    """The engines behind the two servers; the first has two workers and the second one."""
    engines = [client.app.state.engine_client for client in applications.values()]
    for engine, workers in zip(engines, (2, 1), strict=True):
        engine.reset_mock(return_value=True, side_effect=True)
        engine.reset_prefix_cache.return_value = True
        engine.get_weight_version.return_value = "default"  # as after a start
        parallel = SimpleNamespace(world_size_across_dp=workers, world_size=workers)
        engine.vllm_config = SimpleNamespace(parallel_config=parallel)
    return engines


@pytest.fixture
def servers(applications, engines, tmp_path) -> InProcess:
    return InProcess(settings(tmp_path).policy.generation.vllm_server_cfg, applications)


@pytest.fixture
def client(servers) -> server_engine._Client:
    client = server_engine._Client(servers)
    client.version = VERSION
    return client


@pytest.fixture(autouse=True)
def no_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reload as if no layer had to be processed: the layerwise reload itself is for the tests of real engines."""
    monkeypatch.setattr(reload, "initialize_layerwise_reload", lambda model: None)
    monkeypatch.setattr(reload, "finalize_layerwise_reload", lambda model, model_config: None)
