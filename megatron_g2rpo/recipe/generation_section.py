# SPDX-License-Identifier: Apache-2.0
"""``policy.generation``: the rollout engine and how it samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from megatron_g2rpo.recipe.base import Section, Text, conflict

Address = Annotated[str, Field(pattern=r"^https?://[^/\s]+$")]


class VllmConfig(Section):
    """``policy.generation.vllm_cfg``: of vLLM in the training processes, and of the servers that ``serve`` starts."""

    tensor_parallel_size: PositiveInt
    """Ranks that share one engine (``vllm``: neighbouring training processes)."""
    gpu_memory_utilization: Annotated[float, Field(gt=0.0, le=1.0)]
    """Share of the device's memory that the engine may take, weights included (on a CPU: of the machine's)."""
    kv_cache_memory_bytes: PositiveInt | None
    """Memory of the key/value cache; null: what ``gpu_memory_utilization`` leaves of it."""
    images_per_prompt: PositiveInt
    """Most images of a prompt."""
    enforce_eager: bool
    """No CUDA graphs and no compilation."""
    sleep: bool
    """``vllm``: give weights and cache back between generations, where the platform can."""
    vllm_kwargs: Mapping[str, Any]
    """Further arguments of ``vllm.LLM``, in its names (``serve``: of its engine, as command-line options)."""


class VllmServerConfig(Section):
    """``policy.generation.vllm_server_cfg``: servers that are reached over HTTP."""

    addresses: Annotated[tuple[Address, ...], Field(strict=False)]
    """Their base addresses, ``http://HOST:PORT``."""
    weight_transfer: Literal["auto", "files", "broadcast"]
    """How weights get there: safetensors in ``weights_dir``, or from GPU to GPU; auto: the latter between GPUs."""
    weights_dir: Annotated[str, Field(min_length=1)]
    """``files``: a directory that the trainer and the servers see under the same name."""
    max_concurrent_requests: PositiveInt
    """Prompts that one training process has under way at once, over all servers."""
    request_timeout_s: PositiveFloat
    """Longest time for one prompt's group, or one weight update, seconds; a server that takes longer counts as lost."""
    heartbeat_s: PositiveFloat
    """Seconds between health checks while prompts are under way; three failed in a row: the server is lost."""
    retries: NonNegativeInt
    """Further tries of a request on a server that answers its health check, each after twice the pause."""
    on_no_server: Literal["fail", "wait"]
    """When the last one is lost: save a checkpoint and end the run, or wait for one to come back."""

    @model_validator(mode="after")
    def _distinct(self) -> VllmServerConfig:
        if len(set(self.addresses)) != len(self.addresses):
            raise conflict(f"a server is listed twice: {', '.join(self.addresses)}", "addresses")
        return self


class Generation(Section):
    """``policy.generation``: how responses are sampled."""

    backend: Text
    """Name in the registry of rollout engines: embedded in every training process (``transformers``, ``vllm``), servers
    over HTTP (``vllm_server``), or one of the user's."""
    backend_cfg: Mapping[str, Any]
    """Options of an engine of the user's: what its ``build`` takes beside the context."""
    max_new_tokens: PositiveInt
    """Longest response, tokens; one that has not ended by then is truncated."""
    temperature: PositiveFloat
    """Sampling temperature in training; log-probabilities and entropies are taken at it as well."""
    val_temperature: PositiveFloat
    """Temperature of the sampled validation; greedy validation is always run beside it."""
    batch_size: PositiveInt
    """Sequences decoded together on one rank (vLLM: ``max_num_seqs``); changes speed and memory only."""
    gap_warning: PositiveFloat
    """Warn when the engine's log-probabilities are farther than this from the trainer's in the mean of a task, nats."""
    vllm_cfg: VllmConfig
    """Of ``vllm`` and ``vllm_server``."""
    vllm_server_cfg: VllmServerConfig
    """Of ``vllm_server``."""

    @model_validator(mode="after")
    def _servers(self) -> Generation:
        if self.backend == "vllm_server" and not self.vllm_server_cfg.addresses:
            raise conflict(
                "backend vllm_server needs the addresses of its servers; `megatron-g2rpo serve RECIPE` starts one",
                "vllm_server_cfg.addresses",
            )
        return self
