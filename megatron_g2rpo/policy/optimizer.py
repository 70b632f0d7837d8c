# SPDX-License-Identifier: Apache-2.0
"""megatron-core's optimizer and learning-rate schedule from the recipe."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule, TransformerConfig


def wrap_ddp(
    model: MegatronModule, config: TransformerConfig, megatron_cfg: Any, pg_collection: ProcessGroupCollection
) -> DistributedDataParallel:
    """megatron-core's data parallelism: contiguous fp32 gradient buffers, summed over data-parallel ranks.

    Args:
        megatron_cfg: the recipe's ``policy.megatron_cfg``.
    """
    options = megatron_cfg.distributed_data_parallel_config
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=options.grad_reduce_in_fp32,
        overlap_grad_reduce=options.overlap_grad_reduce,
        use_distributed_optimizer=options.use_distributed_optimizer,
        # Sums, not averages: finalize_model_grads divides by the global token count.
        average_in_collective=False,
    )
    return DistributedDataParallel(config=config, ddp_config=ddp_config, module=model, pg_collection=pg_collection)


def build_optimizer(model: DistributedDataParallel, dtype: torch.dtype, megatron_cfg: Any) -> MegatronOptimizer:
    """AdamW with global-norm clipping; no weight decay on biases and norms (megatron-core's standard)."""
    options = megatron_cfg.optimizer
    config = OptimizerConfig(
        optimizer="adam",
        lr=options.lr,
        min_lr=options.min_lr,
        weight_decay=options.weight_decay,
        adam_beta1=options.adam_beta1,
        adam_beta2=options.adam_beta2,
        adam_eps=options.adam_eps,
        clip_grad=options.clip_grad,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=megatron_cfg.distributed_data_parallel_config.use_distributed_optimizer,
    )
    return get_megatron_optimizer(
        config=config,
        model_chunks=[model],
        config_overrides=get_standard_config_overrides(config=config),
        pg_collection=None,  # parallel_state's groups: the same ones, with their gloo twins
    )


def build_scheduler(optimizer: MegatronOptimizer, megatron_cfg: Any, max_steps: int) -> OptimizerParamScheduler:
    """Learning rate by optimizer step.

    Args:
        max_steps: optimizer steps of the whole run; the decay's length where the recipe leaves it open.
    """
    options, schedule = megatron_cfg.optimizer, megatron_cfg.scheduler
    decay_steps = schedule.lr_decay_steps if schedule.lr_decay_steps is not None else max_steps
    return OptimizerParamScheduler(
        optimizer=optimizer,
        init_lr=0.0,
        max_lr=options.lr,
        min_lr=options.min_lr,
        lr_warmup_steps=schedule.lr_warmup_steps,
        lr_decay_steps=max(decay_steps, schedule.lr_warmup_steps + 1),
        lr_decay_style=schedule.lr_decay_style,
        start_wd=options.weight_decay,
        end_wd=options.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
