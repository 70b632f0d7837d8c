# SPDX-License-Identifier: Apache-2.0
"""Weights through files: bit by bit, complete, and gone afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_g2rpo.rollout.base import EngineUnavailable
from megatron_g2rpo.weights import SafetensorsDirectory
from tests.vllm.contract.updates import (
    Stub,
    behind,
    files_engine,
    files_trainer,
    named_tensors,
    source_of,
    weights_of,
    worker_of,
)


def test_vllm_makes_the_files_engine_in_every_process():
    (ours,) = [entry for entry in entry_points(group="vllm.general_plugins") if entry.name == "megatron_g2rpo"]
    ours.load()()
    ours.load()()  # vLLM may load plugins again
    engine = files_engine(Stub())  # an abstract method that is missing would be an error here
    engine.init_transfer_engine(engine.parse_init_info({}))
    engine.shutdown()


def test_weights_go_through_files_bit_by_bit_and_leave_none(client, engines, tmp_path):
    models = [Stub(), Stub()]
    for engine, model in zip(engines, models, strict=True):
        behind(engine, worker_of(files_engine(model)))
    tensors = {name: tensor.bfloat16() for name, tensor in named_tensors().items()}
    files_trainer(client, tmp_path, tensors).send_weights()
    for model in models:
        assert model.given.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert model.given[name].dtype == torch.bfloat16
            assert torch.equal(model.given[name], tensor), name
    assert [*(tmp_path / "weights").iterdir()] == []


def test_missing_parameters_are_an_error_of_the_worker_and_lose_the_server(client, servers, engines, tmp_path):
    tensors = named_tensors()
    del tensors["layer.bias"]
    behind(engines[0], worker_of(files_engine(Stub())))
    files_trainer(client, tmp_path, tensors).send_weights()
    message = "1 parameters of vLLM's model were not given, among them layer.bias"
    assert "HTTP 500" in servers.everyone[0].lost
    assert message in servers.everyone[0].lost

    directory = tmp_path / "incomplete"
    trainer = files_trainer(Copies(directory), tmp_path, tensors)
    trainer.send_weights()
    with pytest.raises(ValueError, match=message):
        files_engine(Stub()).update_weights({"directory": str(directory)})


class Copies:
    """A client that keeps the files of an update, or fails at it."""

    def __init__(self, directory: Path, error: Exception | None = None) -> None:
        self._directory, self._error = directory, error

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None: ...

    def start_weight_update(self) -> None: ...

    def update_weights(self, update_info: dict[str, Any]) -> None:
        assert [*SafetensorsDirectory(update_info["directory"])], "the files must be there, or the check is empty"
        if self._error is not None:
            raise self._error
        Path(update_info["directory"]).rename(self._directory)

    def finish_weight_update(self, weight_version: str | None = None) -> None: ...


def test_files_are_removed_when_the_last_server_is_lost(tmp_path):
    trainer = files_trainer(Copies(tmp_path, EngineUnavailable("none is left")), tmp_path, named_tensors())
    with pytest.raises(EngineUnavailable, match="none is left"):
        trainer.send_weights()
    assert [*(tmp_path / "weights").iterdir()] == []


def test_files_are_removed_when_the_stream_breaks(client, engines, tmp_path):
    trainer = files_trainer(client, tmp_path, named_tensors())

    def broken() -> Iterator[tuple[str, Tensor]]:
        yield from [*named_tensors().items()][:2]
        raise OSError("a peer is gone")

    trainer.source.begin(weights_of(named_tensors(), broken))  # type: ignore[union-attr]
    with pytest.raises(OSError, match="a peer is gone"):
        trainer.send_weights()
    assert [*(tmp_path / "weights").iterdir()] == []
    assert not engines[0].mock_calls, "servers hear of an update when its files are complete"


def test_other_ranks_take_part_in_the_stream_and_do_nothing_else(tmp_path):
    seen: list[str] = []

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in named_tensors().items():
            seen.append(name)
            yield name, tensor

    trainer = files_trainer(None, tmp_path, named_tensors(), is_sender=False)
    trainer.source.begin(weights_of(named_tensors(), stream))  # type: ignore[union-attr]
    trainer.send_weights()
    assert seen == [*named_tensors()], "all of it, once: it is a collective"
    assert not (tmp_path / "weights").exists()


def test_the_source_announces_what_it_yields():
    source = source_of(named_tensors())
    assert [(m.name, m.dtype, m.shape) for m in source.metadata()] == [
        (name, tensor.dtype, tuple(tensor.shape)) for name, tensor in source
    ]
