# SPDX-License-Identifier: Apache-2.0
# pyright: reportMissingImports=false
# (vLLM has an environment of its own; tests/vllm/contract holds what is used of it.)
"""Rollouts from vLLM servers: ``megatron-g2rpo serve`` starts a server, and this engine talks to them over HTTP."""

from __future__ import annotations

import logging
import math
import re
import shutil
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from vllm.distributed.weight_transfer.base import TrainerWeightTransferEngine, WeightTransferUpdatePayload
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine
from vllm.entrypoints.scale_out.token_in_token_out.mm_serde import encode_mm_kwargs_item
from vllm.utils.network_utils import get_ip, get_open_port

from megatron_g2rpo import progress
from megatron_g2rpo.collectives import from_first
from megatron_g2rpo.rollout import base
from megatron_g2rpo.rollout.vllm.http_client import Request, Server, ServerLost, Servers
from megatron_g2rpo.rollout.vllm.translate import ENGINE_ARGUMENTS, PARAMETERS, Answer, Translator, num_logprobs
from megatron_g2rpo.rollout.vllm.weight_transfer import FILES, FilesTrainer, Source, backend_of
from megatron_g2rpo.types import Prompt, Rollout
from megatron_g2rpo.weights import WeightSource

_VERSION = re.compile(r"[0-9a-f]{12}-\d+")
# How vLLM says that an update was begun and not finished.
_OPEN_UPDATE = re.compile("already active|during a weight update")
# What vLLM's API sends instead of a log-probability that is not a number, or minus infinity.
_NOT_FINITE = -9999.0
# Errors that rank 0 raises on behalf of all ranks.
_TOLD = (base.EngineUnavailable, ValueError)
# Longest pause between two looks for a server that is waited for, and for whether the run is to stop, seconds.
_LONGEST_PAUSE, _LOOK = 30.0, 0.2

_logger = logging.getLogger(__name__)


@base.register("vllm_server")
class VllmServerEngine:
    """A rollout engine that consists of vLLM servers.

    Every process of the run sends its prompts to the servers itself; rank 0 alone controls their weight updates.

    Args:
        context: everything that the engine is built from.
    """

    def __init__(self, context: base.Context) -> None:
        generation = context.policy.generation
        self._options = generation.vllm_server_cfg
        self._is_asked_to_stop = context.is_asked_to_stop
        self._translator = Translator(context)
        self._num_logprobs = num_logprobs(generation.top_k)
        self._rank = dist.get_rank() if dist.is_initialized() else 0
        self._servers = Servers(self._options, first=self._rank)
        self._method = backend_of(self._options.weight_transfer, between_gpus=context.nccl)
        # Weights of another run never have one of these names, whatever a server has served before.
        self._run = from_first(lambda: uuid.uuid4().hex[:12])
        self._updates = 0
        self._version: str | None = None
        self._client = _Client(self._servers)
        self._source = Source()
        self._trainer: TrainerWeightTransferEngine[Any] | None = None
        self._reached: tuple[str, ...] = ()
        if self._rank == 0:
            for left in Path(self._options.weights_dir).glob("*"):  # by a run that was killed
                if _VERSION.fullmatch(left.name):
                    shutil.rmtree(left, ignore_errors=True)

    @classmethod
    def build(cls, context: base.Context) -> VllmServerEngine:
        return cls(context)

    def load_weights(self, weights: WeightSource) -> None:
        """Look for servers, and give these weights to all that answer; see ``base.Engine.load_weights``.

        Under ``on_no_server: wait`` it does not return before at least one server answers.

        Raises:
            EngineUnavailable: none does; under ``on_no_server: wait``, when the run was asked to stop.
            ValueError: a server was not started as the recipe says.
        """
        self._version = None
        self._source.begin(weights)
        self._servers.use(from_first(self._find, _TOLD))
        self._updates += 1
        version = f"{self._run}-{self._updates}"
        failure: base.EngineUnavailable | None = None
        try:
            trainer = self._transfer()
            self._client.version = version
            if isinstance(trainer, FilesTrainer):
                trainer.name = version
            trainer.send_weights()
        except base.EngineUnavailable as error:  # on this rank alone: the others are in the stream's collectives
            failure = error
            self._source.drain()

        def reached() -> list[str]:
            if failure is not None:
                raise failure
            return [server.address for server in self._servers.live]

        self._servers.use(from_first(reached, _TOLD))
        self._version = version

    def generate(
        self,
        prompts: Sequence[Prompt],
        n: int,
        *,
        sampling: base.Sampling,
        seed: int,
        group_ids: Sequence[int],
        on_finished: base.OnFinished | None = None,
    ) -> list[Rollout]:
        """Sample ``n`` responses to each prompt; see ``base.Engine.generate``.

        Raises:
            EngineUnavailable: the last server was lost.
            RuntimeError: no weights were loaded, or an answer cannot be used (the prompt is named).
            ValueError: arguments out of range, or a prompt that does not fit its images (it is named).
        """
        if self._version is None:
            raise RuntimeError("the rollout servers have no weights: call load_weights first")
        base.check_request(prompts, n, group_ids)
        requests = [self._request(prompt, n, sampling, seed) for prompt in prompts]
        rollouts: dict[int, list[Rollout]] = {}

        def finish(index: int, choices: list[dict[str, Any]]) -> None:
            chosen = [_answer(choice) for choice in choices]
            rollouts[index] = self._translator.rollouts(prompts[index], group_ids[index], n, sampling, chosen)
            if on_finished is not None:
                on_finished(rollouts[index])

        self._servers.generate(requests, self._version, finish)
        return [rollout for index in range(len(prompts)) for rollout in rollouts[index]]

    def release(self) -> None:
        """Do nothing: the servers do not use this process's memory."""

    def _request(self, prompt: Prompt, n: int, sampling: base.Sampling, seed: int) -> Request:
        parameters, images = self._translator.parameters(prompt, n, sampling, seed), self._translator.images(prompt)
        body: dict[str, Any] = {
            "token_ids": prompt.inputs.token_ids.tolist(),
            "sampling_params": {name: getattr(parameters, name) for name in PARAMETERS},
        }
        if images is not None:
            body["features"] = {
                "mm_hashes": {"image": images.hashes},
                "mm_placeholders": {"image": [{"offset": p.offset, "length": p.length} for p in images.places]},
                "kwargs_data": {"image": [encode_mm_kwargs_item(item) for item in images.items["image"]]},
            }
        return Request(f"prompt {prompt.key!r}", body)

    # -- on rank 0 ----------------------------------------------------------------------------------------------

    def _find(self) -> list[str]:
        """Return the addresses of the servers that answer; wait for one where the recipe says so."""
        pause = 1.0
        while True:
            self._servers.find()
            if self._servers.live:
                break
            nobody = self._servers.unavailable()
            if not nobody.wait or self._is_asked_to_stop():
                raise nobody
            _logger.warning("%s\nwaiting for one; the next look is in %.0f s", nobody, pause)
            end = time.monotonic() + pause
            while time.monotonic() < end and not self._is_asked_to_stop():
                time.sleep(_LOOK)
            progress.advance()  # it waits as the recipe says
            pause = min(2 * pause, _LONGEST_PAUSE)
        self._servers.each(self._check)
        return [server.address for server in self._servers.live]

    def _check(self, server: Server) -> None:
        """Raise if the server was started with options that silently change its log-probabilities."""
        info = self._servers.request(server, "GET", "/server_info?config_format=json").json()["vllm_config"]
        model = info["model_config"]
        found = {
            "logprobs_mode": model["logprobs_mode"],
            "mm_device_do_normalize": (model["multimodal_config"] or {}).get("mm_device_do_normalize", False),
            "weight transfer": (info["weight_transfer_config"] or {}).get("backend"),
        }
        wanted = {name: ENGINE_ARGUMENTS[name] for name in ("logprobs_mode", "mm_device_do_normalize")}
        wanted["weight transfer"] = self._method
        if self._num_logprobs:
            found["max_logprobs"], wanted["max_logprobs"] = model["max_logprobs"], self._num_logprobs
            if model["max_logprobs"] == -1 or model["max_logprobs"] > self._num_logprobs:  # more is no fault; -1: all
                found["max_logprobs"] = self._num_logprobs
        if found != wanted:
            raise ValueError(
                f"{server.address} was started with {found}, but must have {wanted}; start it with "
                "`megatron-g2rpo serve RECIPE`"
            )

    def _transfer(self) -> TrainerWeightTransferEngine[Any]:
        """Return the trainer's half of the weight transfer; over NCCL each new set of servers needs a new one."""
        directory = Path(self._options.weights_dir)
        if self._method == FILES:
            if self._trainer is None:
                self._trainer = FilesTrainer(
                    directory, client=self._client, source=self._source, is_sender=self._rank == 0
                )
            return self._trainer
        if self._trainer is not None and self._rank == 0 and not self._client.is_current():
            self._reached = ()
        servers = tuple(sorted(server.address for server in self._servers.live))
        if self._trainer is None or servers != self._reached:
            if self._trainer is not None and self._rank == 0:
                self._trainer.shutdown()
                self._reached = ()
                self._client.shutdown_weight_transfer_engine()
            info = NCCLTrainerInitInfo(
                rank=self._rank,
                master_address=get_ip(),
                master_port=get_open_port(),
                world_size=1 + (self._client.count_workers() if self._rank == 0 else 0),
            )
            self._trainer = NCCLTrainerWeightTransferEngine.trainer_init(info, client=self._client, source=self._source)
            self._reached = servers
        return self._trainer


class _Client:
    """vLLM's weight-sync client for several servers at once; each is paused from the start of an update to its end.

    Attributes:
        version: name of the weights of the update in progress, or of the last update.
    """

    def __init__(self, servers: Servers) -> None:
        self.version = ""
        self._servers = servers
        self._workers: dict[Server, int] = {}

    def count_workers(self) -> int:
        """Return the number of workers of all live servers together."""

        def ask(server: Server) -> None:
            self._workers[server] = int(self._servers.request(server, "GET", "/get_world_size").json()["world_size"])

        self._servers.each(ask)
        return sum(self._workers[server] for server in self._servers.live)

    def is_current(self) -> bool:
        """Return whether all live servers have the last update; a restarted one has left the trainer's NCCL group."""
        versions: set[str] = set()

        def ask(server: Server) -> None:
            versions.add(self._servers.request(server, "GET", "/weight_info").json()["weight_version"])

        self._servers.each(ask)
        return versions == {self.version}

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Connect all servers; the workers of each take the ranks that follow those of the server before it."""
        offsets, offset = {}, init_info["rank_offset"]
        for server in self._servers.live:
            offsets[server], offset = offset, offset + self._workers[server]

        def ask(server: Server) -> None:
            body = {"init_info": {**init_info, "rank_offset": offsets[server]}}
            self._servers.request(server, "POST", "/init_weight_transfer_engine", json=body)

        self._servers.each(ask)

    def shutdown_weight_transfer_engine(self) -> None:
        self._servers.each(lambda server: self._afresh(server, "/shutdown_weight_transfer_engine"))

    def start_weight_update(self) -> None:
        self._servers.post("/pause?mode=wait")
        self._servers.each(lambda server: self._afresh(server, "/start_weight_update"))

    def _afresh(self, server: Server, path: str) -> None:
        """Send a request that servers refuse during an update; close an update that a killed trainer left open."""
        try:
            self._servers.request(server, "POST", path)
        except ServerLost as error:
            if not _OPEN_UPDATE.search(str(error)):
                raise
            self._servers.request(server, "POST", "/finish_weight_update", json={"weight_version": None})
            self._servers.request(server, "POST", path)

    def update_weights(self, update_info: WeightTransferUpdatePayload) -> None:
        self._servers.post("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Name the new weights, and drop all that was computed with the previous ones (see ``VllmEngine._forget``)."""
        self._servers.post("/finish_weight_update", {"weight_version": weight_version or self.version})
        self._servers.each(self._forget)
        self._servers.post("/resume")

    def _forget(self, server: Server) -> None:
        if not self._servers.request(server, "POST", "/reset_prefix_cache").json()["success"]:
            raise ServerLost("it did not reset its prefix cache")
        self._servers.request(server, "POST", "/reset_mm_cache")
        self._servers.request(server, "POST", "/reset_encoder_cache")


def _answer(choice: dict[str, Any]) -> Answer:
    places = (choice["logprobs"] or {}).get("content") or []
    values = [place["logprob"] for place in places]
    likeliest = [{each["token_id"]: each["logprob"] for each in place["top_logprobs"]} for place in places]
    return Answer(choice["token_ids"], [-math.inf if value <= _NOT_FINITE else value for value in values], likeliest)
