# SPDX-License-Identifier: Apache-2.0
"""The ``policy`` section: the model, its parallel layout and its optimizer."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from megatron_g2rpo.recipe import env_vars
from megatron_g2rpo.recipe.base import Section, ascending, conflict
from megatron_g2rpo.recipe.fp8_section import Fp8Config
from megatron_g2rpo.recipe.generation_section import Generation
from megatron_g2rpo.recipe.keys import quoted

Beta = Annotated[float, Field(ge=0.0, lt=1.0)]


class Optimizer(Section):
    """``policy.megatron_cfg.optimizer``: AdamW, in Megatron-core's names."""

    lr: PositiveFloat
    """Peak learning rate."""
    min_lr: NonNegativeFloat
    """Learning rate that the decay ends at."""
    weight_decay: NonNegativeFloat
    """Decoupled weight decay."""
    adam_beta1: Beta
    """Decay of the gradient's running mean."""
    adam_beta2: Beta
    """Decay of the squared gradient's running mean."""
    adam_eps: PositiveFloat
    """Term added to the denominator of the update."""
    clip_grad: PositiveFloat
    """Largest global L2 norm of the gradient; larger ones are scaled down to it."""
    max_skipped_updates: NonNegativeInt
    """Number of updates in a row that are skipped, because loss or gradient are not finite or the gradient's norm is a
    spike; one more ends the run."""
    grad_norm_spike_factor: Annotated[float, Field(gt=1.0)] | None
    """Multiple of the median of recent gradient norms above which an update is a spike; null: none is."""
    grad_norm_spike_window: PositiveInt
    """Number of last updates whose gradient norms the median is of; before there are as many, no update is a spike."""

    @model_validator(mode="after")
    def _rates(self) -> Optimizer:
        ascending(self, ["min_lr", "lr"])
        return self


class Scheduler(Section):
    """``policy.megatron_cfg.scheduler``: how the learning rate changes over optimizer steps."""

    lr_warmup_steps: NonNegativeInt
    """Number of optimizer steps of linear warm-up from 0."""
    lr_decay_style: Literal["constant", "linear", "cosine"]
    """Shape of the decay after the warm-up."""
    lr_decay_steps: PositiveInt | None
    """Optimizer step at which ``min_lr`` is reached; null: the last optimizer step of the run."""


class DistributedDataParallelConfig(Section):
    """``policy.megatron_cfg.distributed_data_parallel_config``: Megatron-core's gradient reduction."""

    grad_reduce_in_fp32: bool
    """Accumulate and reduce gradients in float32 whatever the precision of the weights."""
    overlap_grad_reduce: bool
    """Reduce gradients while the last micro-batch's backward pass still runs."""
    overlap_param_gather: bool
    """Gather updated weights while the next forward pass already runs; needs ``overlap_grad_reduce`` and
    ``use_distributed_optimizer``."""
    use_distributed_optimizer: bool
    """Shard the optimizer state, and the update, over data-parallel ranks."""

    @model_validator(mode="after")
    def _overlap(self) -> DistributedDataParallelConfig:
        needed = ["use_distributed_optimizer", "overlap_grad_reduce"]
        missing = [name for name in needed if not getattr(self, name)]
        if self.overlap_param_gather and missing:
            raise conflict(f"overlap_param_gather needs {' and '.join(missing)}", "overlap_param_gather", *missing)
        return self


class MegatronConfig(Section):
    """``policy.megatron_cfg``: the parallel layout and the update, in Megatron-core's names."""

    tensor_model_parallel_size: PositiveInt
    """Number of ranks that share every layer; must divide the attention heads and the key-value heads."""
    pipeline_model_parallel_size: PositiveInt
    """Number of pipeline stages, which share the stack of layers; the vision tower is on the first stage."""
    context_parallel_size: PositiveInt
    """Number of ranks that share the tokens of every sequence."""
    sequence_parallel: bool
    """Shard the activations between tensor-parallel regions along the sequence."""
    num_layers_in_first_pipeline_stage: PositiveInt | None
    """Number of language layers of the first stage, at least that of deepstack features; null: an equal share."""
    num_layers_in_last_pipeline_stage: PositiveInt | None
    """Number of language layers of the last stage; null: an equal share."""
    transformer_impl: Literal["auto", "local", "transformer_engine"]
    """Modules of the language layers: Megatron-core's own (``local``) or Transformer Engine's, which need a GPU;
    ``auto``: Transformer Engine's on GPUs, the local ones on a CPU."""
    core_attention: Literal["auto", "local", "transformer_engine"]
    """Attention kernel; ``auto``: Transformer Engine's on GPUs, the local one on a CPU."""
    cp_comm_type: Literal["p2p", "all_gather", "a2a"]
    """How Transformer Engine's attention exchanges keys between context-parallel ranks; the local kernel always
    gathers them."""
    recompute_granularity: Literal["selective", "full"] | None
    """What is recomputed in the backward pass: the core attention (``selective``) or whole layers (``full``); null:
    nothing."""
    recompute_method: Literal["uniform", "block"]
    """Which layers are recomputed under ``full``: all, in chunks of ``recompute_num_layers`` (``uniform``), or only
    that many of each stage (``block``)."""
    recompute_num_layers: PositiveInt
    """Number of layers of a chunk (``uniform``), or of layers of each stage that are recomputed (``block``)."""
    apply_rope_fusion: bool
    """Rotate queries and keys by one kernel of Transformer Engine."""
    bias_activation_fusion: bool
    """Compute the gated activation of the MLP by one compiled kernel."""
    gradient_accumulation_fusion: bool
    """Add weight gradients to the gradient buffer inside of the matrix product; needs NVIDIA apex's
    ``fused_weight_gradient_mlp_cuda``."""
    fp8_cfg: Fp8Config
    """8-bit arithmetic of the language layers."""
    first_last_layers_bf16: bool
    """Keep the first and last language layers out of FP8, as many as the next two keys say."""
    num_layers_at_start_in_bf16: NonNegativeInt
    """Number of first layers that ``first_last_layers_bf16`` keeps in ``policy.precision``."""
    num_layers_at_end_in_bf16: NonNegativeInt
    """Number of last layers that ``first_last_layers_bf16`` keeps in ``policy.precision``."""
    env_vars: dict[str, str]
    """Environment variables of the training processes, set before torch is asked for a device and before Megatron-core
    and Transformer Engine are imported; they replace what the processes inherit."""
    freeze_vision: bool
    """Keep the vision tower and its merger at their initial weights."""
    optimizer: Optimizer
    """Settings of the optimizer."""
    scheduler: Scheduler
    """How the learning rate changes over optimizer steps."""
    distributed_data_parallel_config: DistributedDataParallelConfig
    """How gradients are reduced over data-parallel ranks."""

    @model_validator(mode="after")
    def _environment(self) -> MegatronConfig:
        if wrong := env_vars.faults(self.env_vars):
            raise conflict("; ".join(wrong.values()), *(f"env_vars.{quoted(name)}" for name in wrong))
        return self

    @model_validator(mode="after")
    def _layout(self) -> MegatronConfig:
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            raise conflict(
                "sequence_parallel needs tensor_model_parallel_size above 1: it shards over those ranks",
                "sequence_parallel",
                "tensor_model_parallel_size",
            )
        stages = self.pipeline_model_parallel_size
        outer = ["num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"]
        outer = [name for name in outer if getattr(self, name) is not None]
        if outer and stages == 1:
            raise conflict(
                f"{' and '.join(outer)} needs pipeline_model_parallel_size above 1: there is one stage",
                *outer,
                "pipeline_model_parallel_size",
            )
        if self.fp8_cfg.enabled and self.transformer_impl == "local":
            raise conflict(
                "FP8 needs the layers of Transformer Engine (megatron-core would ignore it on others): set "
                "transformer_impl to transformer_engine or auto, or fp8_cfg.enabled to false",
                "transformer_impl",
                "fp8_cfg.enabled",
            )
        if self.fp8_cfg.enabled and self.fp8_cfg.fp8_recipe == "delayed" and self.first_last_layers_bf16:
            raise conflict(
                "delayed scaling covers all layers of a stage at once and cannot leave the first and last ones out: "
                "set first_last_layers_bf16 to false, or another fp8_recipe",
                "first_last_layers_bf16",
                "fp8_cfg.fp8_recipe",
            )
        return self

    @property
    def model_parallel_size(self) -> int:
        """Number of ranks that hold one copy of the model together."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size


class SequencePacking(Section):
    """``policy.sequence_packing``: the micro-batch, which is one packed row of tokens."""

    train_mb_tokens: PositiveInt
    """Largest number of tokens of a packed row."""
    shared_prefix: bool
    """Whether the responses to one prompt share one copy of it, and of its images, in a row. Changes cost only."""


class Policy(Section):
    """``policy``: the model, its parallel layout, its optimizer, and how it generates."""

    model_name: Annotated[str, Field(min_length=1)]
    """Hugging Face directory with weights, config, tokenizer, image processor and chat template."""
    init: Literal["pretrained", "random"]
    """Initial weights: ``pretrained`` reads those of ``model_name``, ``random`` reads only its config and draws them
    from the run's seed."""
    pretrained_checkpoint: Annotated[str, Field(min_length=1)] | None
    """Megatron checkpoint to read the initial weights from; null: they are taken as ``init`` says."""
    train_global_batch_size: PositiveInt
    """Number of sequences per optimizer step, over all ranks."""
    max_total_sequence_length: PositiveInt
    """Largest number of tokens of prompt and response together; a longer prompt is an error that names the sample."""
    precision: Literal["float32", "bfloat16"]
    """Data type of weights and activations; the optimizer's copy is float32."""
    logprob_chunk_size: PositiveInt | None
    """Number of tokens whose float32 logits are held at once; null: a whole packed row. Changes memory only."""
    vision_cache_mb: NonNegativeInt
    """Megabytes (10^6 bytes) of image features that each rank keeps in host memory, so that an image is encoded once
    while the vision tower's weights stay the same; 0: every pass encodes it anew."""
    sequence_packing: SequencePacking
    """Size of a micro-batch, and what its sequences share."""
    megatron_cfg: MegatronConfig
    """Parallel layout, optimizer and gradient reduction."""
    generation: Generation
    """The rollout engine, and how it samples responses."""

    @model_validator(mode="after")
    def _lengths(self) -> Policy:
        total = self.max_total_sequence_length
        if self.generation.max_new_tokens >= total:
            raise conflict(
                f"generation.max_new_tokens ({self.generation.max_new_tokens}) leaves no room for a prompt in "
                f"max_total_sequence_length ({total})",
                "generation.max_new_tokens",
                "max_total_sequence_length",
            )
        row = self.sequence_packing.train_mb_tokens
        if row < total:
            raise conflict(
                f"sequence_packing.train_mb_tokens ({row}) is less than max_total_sequence_length ({total}): a row "
                "would not hold one sequence",
                "sequence_packing.train_mb_tokens",
                "max_total_sequence_length",
            )
        return self
