# SPDX-License-Identifier: Apache-2.0
"""What this package relies on in vLLM, held against the installed release: names, signatures, routes, payloads.

Requests go through vLLM's own HTTP application and weights through its transfer classes; no engine runs behind them,
and no NCCL. A route that drops an argument that it does not know would answer all the same, so what is asserted is what
arrives behind it.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from vllm import LLM, EngineArgs, RequestOutput, SamplingParams
from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer import base as transfer
from vllm.distributed.weight_transfer import nccl_engine
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLTrainerInitInfo,
    NCCLTrainerWeightTransferEngine,
    NCCLWeightTransferEngine,
    NCCLWeightTransferInitInfo,
    NCCLWeightTransferUpdateInfo,
)
from vllm.entrypoints.scale_out.token_in_token_out.mm_features import mm_kwargs_from_features
from vllm.entrypoints.scale_out.token_in_token_out.protocol import (
    GenerateRequest,
    GenerateTokensChoice,
    GenerateTokensResponse,
    MultiModalFeatures,
)
from vllm.entrypoints.scale_out.token_in_token_out.serving import ServingTokens
from vllm.inputs import mm_input, tokens_input
from vllm.logprobs import Logprob
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader import reload as layerwise
from vllm.outputs import WeightVersionSpan
from vllm.platforms import current_platform
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.worker.gpu_worker import Worker

from megatron_g2rpo.rollout import vllm_reload, vllm_server
from megatron_g2rpo.rollout.base import EngineUnavailable
from megatron_g2rpo.rollout.vllm_io import ENGINE_ARGUMENTS, Translator, engine_arguments
from megatron_g2rpo.rollout.vllm_server import VllmServerEngine
from megatron_g2rpo.rollout.vllm_transfer import FILES, FilesEngine, FilesTrainer, Source, register
from megatron_g2rpo.weights import SafetensorsDirectory, WeightSource
from tests.vllm import common
from tests.vllm.application import InProcess, parse, serving

ADDRESSES = ("http://first:8000", "http://second:8000")
VERSION = "0123456789ab-3"


def takes(function: Any, *positional: object, **keywords: object) -> None:
    """Fails where a function, given as that of a class, does not take a call."""
    inspect.signature(function).bind(*positional, **keywords)


# -- names and signatures ---------------------------------------------------------------------------------------


def test_llm_has_the_methods_that_the_engine_in_process_calls():
    takes(LLM._render_and_add_requests, None, [], [])
    takes(LLM.wait_for_completion, None, use_tqdm=False)
    takes(LLM.apply_model, None, lambda model: None)
    takes(LLM.sleep, None, level=2)
    takes(LLM.wake_up, None, tags=["weights"])
    takes(LLM.reset_prefix_cache, None)
    takes(LLM.reset_mm_cache, None)
    takes(LLMEngine.reset_encoder_cache, None)
    assert inspect.signature(LLM.reset_prefix_cache).return_annotation in (bool, "bool")
    assert callable(current_platform.is_sleep_mode_available)
    assert "outputs" in inspect.signature(RequestOutput).parameters


def test_the_engine_takes_every_argument_that_a_recipe_gives():
    given = engine_arguments(common.load_recipe().policy, "float32")
    further = {"load_format", "enable_sleep_mode", "disable_log_stats", "distributed_executor_backend"}
    assert given.keys() | further | {"weight_transfer_config"} <= inspect.signature(EngineArgs).parameters.keys()
    assert ENGINE_ARGUMENTS.items() <= given.items()


def test_rendered_prompts_are_what_the_private_entrance_takes():
    assert tokens_input([1, 2])["prompt_token_ids"] == [1, 2]
    takes(mm_input, [1], mm_kwargs=None, mm_hashes={}, mm_placeholders={})


def test_the_layerwise_reload_is_where_the_reload_looks_for_it():
    takes(layerwise.initialize_layerwise_reload, nn.Module())
    takes(layerwise.finalize_layerwise_processing, nn.Module(), None)
    takes(layerwise.finalize_layerwise_reload, nn.Module(), None)
    assert issubclass(ParallelLMHead, VocabParallelEmbedding)


def test_nccl_takes_what_the_trainer_passes():
    info = NCCLTrainerInitInfo(rank=1, master_address="10.0.0.1", master_port=29400, world_size=5)
    assert not info.is_sender
    takes(NCCLTrainerWeightTransferEngine.trainer_init, info, client=None, source=None)
    takes(NCCLTrainerWeightTransferEngine.send_weights, None)
    takes(NCCLTrainerWeightTransferEngine.shutdown, None)
    assert issubclass(NCCLTrainerWeightTransferEngine, transfer.TrainerWeightTransferEngine)


def test_the_client_is_a_weight_sync_client_of_vllm():
    client = vllm_server._Client(SimpleNamespace())  # type: ignore[arg-type]
    assert isinstance(client, transfer.VLLMWeightSyncClient)
    for name in ("init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update"):
        theirs = inspect.signature(getattr(transfer.VLLMWeightSyncClient, name)).parameters
        ours = inspect.signature(getattr(vllm_server._Client, name)).parameters
        assert [*ours] == [*theirs], name


def test_a_missing_parameter_is_seen():
    """Negative: of ``takes``."""
    with pytest.raises(TypeError, match="unexpected keyword argument 'fly'"):
        takes(LLM.wait_for_completion, None, fly=True)


# -- a whole update, over vLLM's application --------------------------------------------------------------------


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
def client(servers) -> vllm_server._Client:
    client = vllm_server._Client(servers)
    client.version = VERSION
    return client


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


# -- vLLM's broadcast, under the engine that drives it ------------------------------------------------------------


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
    engine._servers, engine._client = servers, vllm_server._Client(servers)
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


# -- an update that was left open -------------------------------------------------------------------------------


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


# -- files ------------------------------------------------------------------------------------------------------


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


@pytest.fixture(autouse=True)
def no_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reload as if no layer had to be processed: the layerwise reload itself is for the tests of real engines."""
    monkeypatch.setattr(vllm_reload, "initialize_layerwise_reload", lambda model: None)
    monkeypatch.setattr(vllm_reload, "finalize_layerwise_reload", lambda model, model_config: None)


def files_engine(model: nn.Module) -> FilesEngine:
    """As a worker of vLLM's makes it of its configuration."""
    register()
    made = WeightTransferEngineFactory.create_engine(
        WeightTransferConfig(backend=FILES), config(), torch.device("cpu"), model
    )
    assert isinstance(made, FilesEngine)
    return made


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


# -- tokens in, tokens out --------------------------------------------------------------------------------------


@pytest.fixture
def engine(tmp_path) -> VllmServerEngine:
    return VllmServerEngine(common.context(settings(tmp_path)))


@pytest.mark.parametrize("temperature", [0.7, 0.0])
def test_a_request_says_to_the_server_what_the_engine_in_process_is_told(engine, tmp_path, temperature):
    translator = Translator(common.context(settings(tmp_path)))
    for prompt in common.make_prompts(3):  # with 0, 1 and 2 images
        body = engine._request(prompt, 4, temperature, 5).body
        assert body.keys() <= GenerateRequest.model_fields.keys(), "others would be dropped without a word"
        assert body["sampling_params"].keys() <= inspect.signature(SamplingParams).parameters.keys()
        request = GenerateRequest.model_validate_json(json.dumps(body))
        assert request.token_ids == prompt.inputs.token_ids.tolist()
        ours = translator.sampling(prompt, 4, temperature, 5)
        ours.output_kind = request.sampling_params.output_kind  # the server sets it itself
        assert repr(request.sampling_params) == repr(ours)
        assert request.sampling_params.logit_bias == ours.logit_bias
        assert request.sampling_params.seed == ours.seed
        images = translator.images(prompt)
        assert (request.features is None) == (images is None)
        if images is not None:
            assert body["features"].keys() <= MultiModalFeatures.model_fields.keys()
            assert request.features.mm_hashes == {"image": images.hashes}
            places = request.features.mm_placeholders["image"]
            assert [(p.offset, p.length) for p in places] == [(p.offset, p.length) for p in images.places]
            arrived = mm_kwargs_from_features(request.features)["image"]
            for there, here in zip(arrived, images.items["image"], strict=True):
                assert there.keys() == here.keys() == {"pixel_values", "image_grid_thw"}
                for name in here:
                    assert torch.equal(there[name].data, here[name].data), name
                    assert there[name].data.dtype == here[name].data.dtype
                    assert type(there[name].field) is type(here[name].field)
                    assert there[name].field.keep_on_cpu == here[name].field.keep_on_cpu


def answered(*logprobs: float) -> dict[str, Any]:
    """A choice as vLLM's server makes it of an engine's output and sends it."""
    ids = list(range(7, 7 + len(logprobs)))
    places = [{token: Logprob(logprob=value, rank=1)} for token, value in zip(ids, logprobs, strict=True)]
    content = ServingTokens._create_tokens_logprobs(None, ids, places, 0)  # type: ignore[arg-type]
    choice = GenerateTokensChoice(
        index=0, token_ids=ids, logprobs=content, weight_versions=[WeightVersionSpan(VERSION, 0, len(ids))]
    )
    response = GenerateTokensResponse(request_id="0", created=0, model="policy", choices=[choice], usage=None)
    return json.loads(response.model_dump_json())["choices"][0]


def test_an_answer_carries_tokens_logprobs_and_the_version_of_its_weights():
    choice = answered(-0.25, -3.5)
    assert vllm_server._answer(choice) == ([7, 8], [-0.25, -3.5])
    assert {span["version"] for span in choice["weight_versions"]} == {VERSION}


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_logprob_that_is_no_number_is_an_error_over_http_too(tmp_path, value):
    """JSON has none, so vLLM sends a finite one instead: taken for real, it would end in the loss."""
    choice = answered(-0.25, value)
    assert math.isfinite(choice["logprobs"]["content"][1]["logprob"])
    (prompt,) = common.make_prompts(1)
    translator = Translator(common.context(settings(tmp_path)))
    with pytest.raises(RuntimeError, match=r"2 tokens with 1 finite .* the weights have diverged"):
        translator.rollouts(prompt, 0, 1, [vllm_server._answer(choice)])


def test_the_token_endpoint_takes_a_request_and_asks_for_tokens(applications, engine):
    """Through vLLM's application: as far as the handler that would ask the engine."""
    asked: list[GenerateRequest] = []

    class Handler:
        async def serve_tokens(self, request: GenerateRequest, raw_request: object) -> GenerateTokensResponse:
            asked.append(request)
            return GenerateTokensResponse(request_id="0", created=0, model="policy", choices=[], usage=None)

    client = applications[ADDRESSES[0]]
    client.app.state.serving_tokens = Handler()
    try:
        body = engine._request(common.make_prompts(2)[1], 4, 1.0, 5).body
        response = client.post("/inference/v1/generate", json=body)
    finally:
        client.app.state.serving_tokens = None
    assert response.status_code == 200, response.text
    assert [request.token_ids for request in asked] == [body["token_ids"]]
    assert response.json()["choices"] == []
    assert asyncio.iscoroutinefunction(ServingTokens.serve_tokens)
