# SPDX-License-Identifier: Apache-2.0
"""Trainers of vLLM's weight transfer, and workers of its engines, as far as an update needs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer import nccl_engine
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLTrainerInitInfo,
    NCCLTrainerWeightTransferEngine,
)
from vllm.v1.worker.gpu_worker import Worker

from megatron_g2rpo.rollout.vllm.weight_transfer import FILES, FilesEngine, FilesTrainer, Source, register
from megatron_g2rpo.weights import WeightSource
from tests.vllm import common

ADDRESSES = ("http://first:8000", "http://second:8000")
VERSION = "0123456789ab-3"


def settings(tmp_path: Path):
    section = "policy.generation.vllm_server_cfg"
    return common.load_recipe(
        "policy.generation.backend=vllm_server",
        f"{section}.addresses=[{', '.join(ADDRESSES)}]",
        f"{section}.weights_dir={tmp_path / 'weights'}",
    )


def called(engine: Any) -> list[str]:
    return [name for name, _, _ in engine.mock_calls]


UPDATE = [
    "pause_generation",
    "start_weight_update",
    "update_weights",
    "finish_weight_update",
    "reset_prefix_cache",
    "reset_mm_cache",
    "reset_encoder_cache",
    "resume_generation",
]


def named_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = {"embed.weight": (5, 4), "layer.weight": (4, 4), "layer.bias": (4,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def source_of(tensors: dict[str, Tensor]) -> Source:
    source = Source()
    source.begin(weights_of(tensors))
    return source


def weights_of(tensors: dict[str, Tensor], stream: Callable[[], Iterator[tuple[str, Tensor]]] | None = None):
    specs = {name: tensor.to("meta") for name, tensor in tensors.items()}
    return WeightSource(lambda: specs, stream or (lambda: iter(tensors.items())))


def files_trainer(client: Any, tmp_path: Path, tensors: dict[str, Tensor], *, is_sender: bool = True) -> FilesTrainer:
    trainer = FilesTrainer(tmp_path / "weights", client=client, source=source_of(tensors), is_sender=is_sender)
    trainer.name = VERSION
    return trainer


def nccl_trainer(client: Any, monkeypatch: pytest.MonkeyPatch) -> NCCLTrainerWeightTransferEngine:
    """vLLM's own, but for the network."""
    nccl_engine_without_network(monkeypatch)
    info = NCCLTrainerInitInfo(
        rank=0, master_address="10.0.0.1", master_port=29400, world_size=1 + client.count_workers()
    )
    return NCCLTrainerWeightTransferEngine.trainer_init(info, client=client, source=source_of(named_tensors()))


def nccl_engine_without_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl_engine, "open_trainer_endpoint", lambda info: None)
    monkeypatch.setattr(NCCLTrainerWeightTransferEngine, "_broadcast", lambda self, source, meta: [*source])


class Stub(nn.Module):
    """A model whose parameters are those of ``named_tensors``; it keeps what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.layer = nn.Linear(4, 4)
        self.given: dict[str, Tensor] = {}

    def load_weights(self, weights: Any) -> set[str]:
        self.given = {name: tensor.clone() for name, tensor in weights}
        return set(self.given)


def config(parallel: object = None) -> Any:
    return SimpleNamespace(parallel_config=parallel, model_config=SimpleNamespace(dtype=torch.float32))


def worker_of(engine: FilesEngine) -> Worker:
    """vLLM's worker as far as an update needs one."""
    worker = object.__new__(Worker)
    worker.vllm_config, worker.weight_transfer_engine = engine.vllm_config, engine
    worker.vllm_config.compilation_config = SimpleNamespace()
    worker.model_runner = SimpleNamespace(reset_lora_state=lambda: None)
    worker._weight_update_active = worker._weight_update_is_draft = False
    return worker


def behind(engine: Any, worker: Worker) -> None:
    """Let the engine behind a server do on a worker what vLLM's does, errors included."""

    def calls(name: str, *arguments: object) -> None:
        try:
            getattr(worker, name)(*arguments)
        except Exception as error:
            raise RuntimeError(f"Call to collective_rpc method failed: {error}") from error

    engine.start_weight_update.side_effect = lambda: calls("start_weight_update")
    engine.update_weights.side_effect = lambda request: calls("update_weights", request.update_info)
    engine.finish_weight_update.side_effect = lambda version: calls("finish_weight_update")
    engine.shutdown_weight_transfer_engine.side_effect = lambda: calls("shutdown_weight_transfer_engine")


def files_engine(model: nn.Module) -> FilesEngine:
    """As a worker of vLLM's makes it of its configuration."""
    register()
    made = WeightTransferEngineFactory.create_engine(
        WeightTransferConfig(backend=FILES), config(), torch.device("cpu"), model
    )
    assert isinstance(made, FilesEngine)
    return made
