# SPDX-License-Identifier: Apache-2.0
"""Weights over NCCL, by vLLM's classes but for the network: who joins the group, and when it is made again."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLWeightTransferEngine,
    NCCLWeightTransferInitInfo,
)

from megatron_g2rpo.rollout.base import EngineUnavailable
from megatron_g2rpo.rollout.vllm import server_engine
from megatron_g2rpo.rollout.vllm.server_engine import VllmServerEngine
from megatron_g2rpo.weights import WeightSource
from tests.vllm import common
from tests.vllm.contract.updates import (
    ADDRESSES,
    config,
    named_tensors,
    nccl_engine_without_network,
    nccl_trainer,
    settings,
)


def test_workers_of_all_servers_take_consecutive_ranks_after_the_trainer(client, engines, monkeypatch):
    nccl_trainer(client, monkeypatch)
    infos = []
    for engine in engines:
        (call,) = engine.init_weight_transfer_engine.mock_calls
        infos.append(NCCLWeightTransferInitInfo(**call.args[0].init_info))
    assert [info.world_size for info in infos] == [4, 4]
    assert [info.rank_offset for info in infos] == [1, 3]
    assert {(info.master_address, info.master_port, info.packed) for info in infos} == {("10.0.0.1", 29400, True)}

    joined: list[int] = []
    join = lambda address, port, rank, world_size, device: joined.append(rank)  # noqa: E731
    monkeypatch.setattr("vllm.distributed.weight_transfer.nccl_common.stateless_init_process_group", join)
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    for info, workers in zip(infos, (2, 1), strict=True):
        for rank in range(workers):
            parallel = SimpleNamespace(data_parallel_index=0, world_size=workers, rank=rank)
            worker = NCCLWeightTransferEngine(None, config(parallel), torch.device("cpu"), nn.Module())  # type: ignore[arg-type]
            worker.init_transfer_engine(info)
    assert joined == [1, 2, 3], "with the trainer, rank 0, they are the world"


def test_ranks_are_counted_over_the_live_servers(client, servers, engines, monkeypatch):
    servers.lose(servers.everyone[0], "gone")
    nccl_trainer(client, monkeypatch)
    assert not engines[0].mock_calls
    (call,) = engines[1].init_weight_transfer_engine.mock_calls
    assert (call.args[0].init_info["rank_offset"], call.args[0].init_info["world_size"]) == (1, 2)


class Stream:
    """Weights whose collectives are counted: ``specs`` and whole iterations."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.source = WeightSource(self._specs, self._tensors)

    def _specs(self) -> dict[str, Tensor]:
        self.calls.append("specs")
        return {name: tensor.to("meta") for name, tensor in named_tensors().items()}

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        yield from named_tensors().items()
        self.calls.append("tensors")


@pytest.fixture
def broadcaster(servers, engines, tmp_path, monkeypatch) -> VllmServerEngine:
    """Rank 0 of a run that broadcasts, with vLLM's trainer but for the network."""
    nccl_engine_without_network(monkeypatch)
    engine = VllmServerEngine(common.context(settings(tmp_path), nccl=True))
    engine._servers, engine._client = servers, server_engine._Client(servers)
    monkeypatch.setattr(engine, "_check", lambda server: None)
    monkeypatch.setattr(servers, "find", lambda: servers.use(ADDRESSES))
    return engine


def keep_versions(engines: list[Any]) -> None:
    """Let servers say which weights they have."""
    for engine in engines:
        engine.finish_weight_update.side_effect = partial(setattr, engine.get_weight_version, "return_value")


def test_broadcasts_go_to_one_group_until_a_server_is_started_again(broadcaster, engines):
    keep_versions(engines)
    for updates, started_again in enumerate([False, False, True, False], 1):
        if started_again:
            engines[1].get_weight_version.return_value = "default"
        broadcaster.load_weights(Stream().source)
        groups = 1 if updates < 3 else 2
        assert [engine.init_weight_transfer_engine.call_count for engine in engines] == [groups] * 2
        assert [engine.shutdown_weight_transfer_engine.call_count for engine in engines] == [groups - 1] * 2
        assert {engine.get_weight_version.return_value for engine in engines} == {broadcaster._version}


@pytest.mark.parametrize("fails", ["init_weight_transfer_engine", "start_weight_update", "finish_weight_update"])
def test_where_all_servers_are_lost_this_rank_still_takes_part_in_the_stream_once(broadcaster, engines, fails):
    """Negative for a run of several ranks: the others would wait for it in a collective, for ever."""
    stream = Stream()
    for engine in engines:
        getattr(engine, fails).side_effect = RuntimeError("CUDA error")
    with pytest.raises(EngineUnavailable, match="CUDA error"):
        broadcaster.load_weights(stream.source)
    assert stream.calls == ["specs", "tensors"]
    for engine in engines:
        getattr(engine, fails).side_effect = None
    keep_versions(engines)
    broadcaster.load_weights(Stream().source)
    assert {engine.get_weight_version.return_value for engine in engines} == {broadcaster._version}
