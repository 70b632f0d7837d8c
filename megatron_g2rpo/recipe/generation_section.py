# SPDX-License-Identifier: Apache-2.0
"""``policy.generation``: the rollout engine and how it samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from megatron_g2rpo.recipe.base import Section, Text, conflict

Address = Annotated[str, Field(pattern=r"^https?://[^/\s]+$")]
# A share of probability; null: off.
Share = Annotated[float, Field(gt=0.0, le=1.0)] | None
StopStrings = Annotated[tuple[Text, ...], Field(strict=False)] | None


class VllmConfig(Section):
    """``policy.generation.vllm_cfg``: settings of vLLM in the training processes or in servers of ``serve``."""

    tensor_parallel_size: PositiveInt
    """Number of ranks that share one engine (backend ``vllm``: neighbouring training processes)."""
    gpu_memory_utilization: Annotated[float, Field(gt=0.0, le=1.0)]
    """Share of the device's memory that the engine may take, weights included (on a CPU: of the machine's)."""
    kv_cache_memory_bytes: PositiveInt | None
    """Memory of the key/value cache, bytes; null: what is left under ``gpu_memory_utilization``."""
    images_per_prompt: PositiveInt
    """Largest number of images in a prompt."""
    enforce_eager: bool
    """Run the model without CUDA graphs and without compilation."""
    sleep: bool
    """Backend ``vllm``: free the memory of weights and cache between generations, where the platform supports it."""
    vllm_kwargs: Mapping[str, Any]
    """Further arguments of ``vllm.LLM``, under its names; ``serve`` passes them on as command-line options."""


class VllmServerConfig(Section):
    """``policy.generation.vllm_server_cfg``: settings of vLLM servers that are reached over HTTP."""

    addresses: Annotated[tuple[Address, ...], Field(strict=False)]
    """Base addresses of the servers, ``http://HOST:PORT`` each."""
    weight_transfer: Literal["auto", "files", "broadcast"]
    """How weights reach the servers: ``files`` (safetensors in ``weights_dir``), ``broadcast`` (from GPU to GPU), or
    ``auto``: broadcast between GPUs, else files."""
    weights_dir: Annotated[str, Field(min_length=1)]
    """Directory of the weights under ``files``; trainer and servers must see it under the same path."""
    max_concurrent_requests: PositiveInt
    """Largest number of prompts that one training process has in progress at once, over all servers."""
    request_timeout_s: PositiveFloat
    """Longest time for one prompt's group, or one weight update, seconds; a server that takes longer counts as lost."""
    heartbeat_s: PositiveFloat
    """Seconds between health checks while prompts are in progress; a server that fails three in a row is lost."""
    retries: NonNegativeInt
    """Number of times that a failed request is repeated on a server that answers its health check; the pause doubles
    each time."""
    on_no_server: Literal["fail", "wait"]
    """What to do when the last server is lost: ``fail`` saves a checkpoint and ends the run, ``wait`` waits for one to
    come back."""

    @model_validator(mode="after")
    def _distinct(self) -> VllmServerConfig:
        if len(set(self.addresses)) != len(self.addresses):
            raise conflict(f"a server is listed twice: {', '.join(self.addresses)}", "addresses")
        return self


class Generation(Section):
    """``policy.generation``: the rollout engine, and how it samples responses."""

    backend: Text
    """Name of the rollout engine: embedded in every training process (``transformers``, ``vllm``), servers over HTTP
    (``vllm_server``), or the name of a user's engine."""
    backend_cfg: Mapping[str, Any]
    """Options of a user's engine: the keyword-only parameters of its ``build``."""
    max_new_tokens: PositiveInt
    """Largest number of tokens in a response; a longer response is truncated."""
    temperature: PositiveFloat
    """Sampling temperature in training; log-probabilities and entropies are taken at it as well."""
    top_k: Annotated[int, Field(ge=1, le=128)] | None
    """Training: sample from this many most likely tokens, which the trainer's distribution is then over as well; null:
    from all tokens."""
    top_p: Share
    """Training: sample from the most likely tokens whose probabilities first add up to this share, among those that
    ``top_k`` keeps; 1.0 or null: from all of these."""
    min_p: Share
    """Training: sample from tokens with at least this share of the largest probability; needs ``top_k``; null: off."""
    stop_strings: StopStrings
    """Training: text that ends a response, which it is part of; null: end-of-turn tokens alone end it."""
    val_temperature: PositiveFloat
    """Temperature of the sampled validation; greedy validation is always run beside it."""
    val_top_k: PositiveInt | None
    """``top_k`` of the sampled validation; null: off."""
    val_top_p: Share
    """``top_p`` of the sampled validation; null: off."""
    val_min_p: Share
    """``min_p`` of the sampled validation; null: off."""
    val_stop_strings: StopStrings
    """``stop_strings`` of validation, sampled and greedy."""
    batch_size: PositiveInt
    """Number of sequences decoded together on one rank (vLLM: ``max_num_seqs``); changes speed and memory only."""
    gap_warning: PositiveFloat
    """Largest mean distance, per task and in nats, of the engine's log-probabilities from the trainer's before a
    warning is logged."""
    vllm_cfg: VllmConfig
    """Settings of vLLM, for the backends ``vllm`` and ``vllm_server``."""
    vllm_server_cfg: VllmServerConfig
    """Settings of the backend ``vllm_server``."""

    @model_validator(mode="after")
    def _replayable(self) -> Generation:
        # A top_p of 1.0, as other frameworks write "off", keeps every token: the engines do what they do for null.
        filters = [name for name, off in (("top_p", (None, 1.0)), ("min_p", (None,))) if getattr(self, name) not in off]
        if filters and self.top_k is None:
            raise conflict(
                f"{' and '.join(filters)} without top_k would keep any number of tokens: the trainer's distribution is "
                "over the tokens that a response was sampled from, or the surrogate's ratio and the metrics of the "
                "mismatch with the engine would compare two distributions; set top_k as well, at most 128, or filter "
                "in validation alone (val_top_p, val_min_p)",
                *filters,
            )
        return self

    @model_validator(mode="after")
    def _servers(self) -> Generation:
        if self.backend == "vllm_server" and not self.vllm_server_cfg.addresses:
            raise conflict(
                "backend vllm_server needs the addresses of its servers; `megatron-g2rpo serve RECIPE` starts one",
                "vllm_server_cfg.addresses",
            )
        return self
