# SPDX-License-Identifier: Apache-2.0
"""A weight update of two servers, through vLLM's HTTP application and its transfer classes.

A route that drops an argument that it does not know would answer all the same, so what is asserted is what arrives
behind it.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLWeightTransferUpdateInfo,
)

from tests.vllm.contract.updates import (
    UPDATE,
    VERSION,
    Stub,
    behind,
    called,
    files_engine,
    files_trainer,
    named_tensors,
    nccl_trainer,
    worker_of,
)


@pytest.mark.parametrize("method", ["files", "nccl"])
def test_an_update_pauses_both_servers_names_the_weights_and_forgets_the_old_ones(
    client, engines, tmp_path, monkeypatch, method
):
    if method == "files":
        trainer: Any = files_trainer(client, tmp_path, named_tensors())
    else:
        trainer = nccl_trainer(client, monkeypatch)
        for engine in engines:
            engine.reset_mock()
    trainer.send_weights()
    for engine in engines:
        assert called(engine) == UPDATE
        assert engine.pause_generation.call_args.kwargs["mode"] == "wait", "others would abort what is under way"
        assert engine.finish_weight_update.call_args.args == (VERSION,)
        (info,) = {json.dumps(call.kwargs["request"].update_info) for call in engine.update_weights.mock_calls}
        if method == "files":
            assert json.loads(info) == {"directory": str(tmp_path / "weights" / VERSION)}
        else:
            update = NCCLWeightTransferUpdateInfo(**json.loads(info))
            assert update.names == [*named_tensors()]
            assert update.dtype_names == ["float32"] * 3
            assert update.shapes == [[5, 4], [4, 4], [4]]


def test_a_transfer_is_shut_down_on_every_server(client, engines):
    client.shutdown_weight_transfer_engine()
    assert [called(engine) for engine in engines] == [["shutdown_weight_transfer_engine"]] * 2


def test_a_server_that_fails_in_an_update_is_lost_and_the_other_goes_on(client, servers, engines, tmp_path):
    engines[0].update_weights.side_effect = RuntimeError("Call to collective_rpc method failed: weight stream: ...")
    files_trainer(client, tmp_path, named_tensors()).send_weights()
    assert called(engines[0]) == UPDATE[:3]
    assert called(engines[1]) == UPDATE
    assert servers.everyone[0].lost.startswith("POST /update_weights: HTTP 500:")
    assert "weight stream: ..." in servers.everyone[0].lost


def test_a_server_that_keeps_its_prefix_cache_is_lost(client, servers, engines, tmp_path):
    engines[0].reset_prefix_cache.return_value = False
    files_trainer(client, tmp_path, named_tensors()).send_weights()
    assert servers.everyone[0].lost == "it did not reset its prefix cache"
    assert servers.everyone[1].lost is None


def test_a_worker_starts_no_update_while_another_is_open():
    """What the next tests are about, in vLLM's words."""
    worker = worker_of(files_engine(Stub()))
    worker.start_weight_update()
    with pytest.raises(RuntimeError, match="already active"):
        worker.start_weight_update()
    with pytest.raises(RuntimeError, match="during a weight update"):
        worker.shutdown_weight_transfer_engine()
    worker.finish_weight_update()
    worker.shutdown_weight_transfer_engine()
    worker.start_weight_update()


def test_servers_of_a_trainer_that_was_killed_in_an_update_take_the_next_one(client, servers, engines, tmp_path):
    models = [Stub(), Stub()]
    for engine, model in zip(engines, models, strict=True):
        behind(engine, worker_of(files_engine(model)))
    client.start_weight_update()  # ... and no more
    files_trainer(client, tmp_path, named_tensors()).send_weights()
    assert [server.lost for server in servers.everyone] == [None, None]
    for engine, model in zip(engines, models, strict=True):
        assert model.given.keys() == named_tensors().keys()
        versions = [call.args[0] for call in engine.finish_weight_update.mock_calls]
        assert versions == [None, VERSION], "what was left open gets no name"


def test_a_transfer_is_shut_down_in_an_update_that_was_left_open(client, servers, engines):
    for engine in engines:
        behind(engine, worker_of(files_engine(Stub())))
    client.start_weight_update()
    client.shutdown_weight_transfer_engine()
    client.start_weight_update()
    assert [server.lost for server in servers.everyone] == [None, None]


def test_another_failure_to_start_loses_the_server(client, servers, engines, tmp_path):
    engines[0].start_weight_update.side_effect = RuntimeError("Weight transfer not configured.")
    files_trainer(client, tmp_path, named_tensors()).send_weights()
    assert "Weight transfer not configured." in servers.everyone[0].lost
    engines[0].finish_weight_update.assert_not_called()
