# SPDX-License-Identifier: Apache-2.0
"""Builds megatron-core's data parallelism, optimizer and learning-rate schedule from the recipe.

Gradients are normalised once: every rank's loss is a sum over its tokens, data- and context-parallel ranks are summed,
and ``finalize_model_grads`` divides by the global token count.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import MegatronModule, TransformerConfig

from megatron_g2rpo import recipe
from megatron_g2rpo.policy.optimizer_shares import single


def wrap_ddp(
    model: MegatronModule,
    config: TransformerConfig,
    settings: recipe.DistributedDataParallelConfig,
    pg_collection: ProcessGroupCollection,
) -> DistributedDataParallel:
    """Wrap a model in megatron-core's DDP: contiguous gradient buffers, summed over data- and context-parallel ranks.

    Args:
        model: this rank's pipeline stage.
        config: the model's configuration.
        settings: the recipe's ``policy.megatron_cfg.distributed_data_parallel_config``.
        pg_collection: megatron-core's process groups.
    """
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=settings.grad_reduce_in_fp32,
        overlap_grad_reduce=settings.overlap_grad_reduce,
        overlap_param_gather=settings.overlap_param_gather,
        use_distributed_optimizer=settings.use_distributed_optimizer,
        average_in_collective=False,
        # megatron-core 0.19 leaves weights as they are without it: an optimizer step would change nothing.
        fp8_param_gather=config.fp8_param,
    )
    return DistributedDataParallel(config=config, ddp_config=ddp_config, module=model, pg_collection=pg_collection)


def schedule_functions(
    config: TransformerConfig,
    ddp: DistributedDataParallel,
    optimizer: MegatronOptimizer,
    *,
    after_backward: Callable[[], None] | None = None,
) -> None:
    """Set the functions by which megatron-core's schedules reduce gradients, as its own training does.

    Args:
        config: the model's configuration, which the schedules read; it is changed.
        ddp: the wrapped model.
        optimizer: the optimizer, whose loss scale is used.
        after_backward: function that completes this rank's gradients once all micro-batches have run their backward
            pass, before they are reduced and divided by tokens; None: they are complete then.
    """
    overlap = ddp.ddp_config.overlap_grad_reduce
    config.finalize_model_grads_func = finalize_model_grads
    if after_backward is not None:
        config.finalize_model_grads_func = partial(_complete_and_finalize, after_backward)
    config.grad_scale_func = optimizer.scale_loss
    # Only the last micro-batch's backward pass may start a reduction.
    config.no_sync_func = ddp.no_sync if overlap else None
    # Under pipeline parallelism, later stages reduce in the bubble after their last backward pass, all buckets at once.
    config.grad_sync_func = ddp.start_grad_sync if overlap else None
    # Gathers of updated weights start in hooks before each module's forward; only the interleaved schedule calls this.
    config.param_sync_func = None


def _complete_and_finalize(
    complete: Callable[[], None], model: list[Any], num_tokens: torch.Tensor | None = None, **keywords: Any
) -> None:
    """Complete gradients, then finalize them; but for the first, the arguments are those that schedules pass."""
    complete()
    finalize_model_grads(model=model, num_tokens=num_tokens, **keywords)


def check_normalisation(config: TransformerConfig, ddp: DistributedDataParallel) -> None:
    """Check that only ``finalize_model_grads`` scales gradients, and that it divides them by the number of tokens.

    Raises:
        RuntimeError: the gradient would be scaled twice, or by a number of ranks.
    """
    if not config.calculate_per_token_loss:
        raise RuntimeError("calculate_per_token_loss is off: micro-batches would be averaged, whatever their tokens")
    if ddp.ddp_config.average_in_collective:
        raise RuntimeError("average_in_collective is on: gradients would be divided by data-parallel ranks as well")
    factors = {part.gradient_scaling_factor for buffer in _buffers(ddp) for part in (buffer, *buffer.buckets)}
    if factors - {1.0}:
        raise RuntimeError(f"gradient buffers scale by {sorted(factors)} before they are summed; it must be 1.0")


def wait_for_parameters(ddp: DistributedDataParallel) -> None:
    """Make every weight current on every rank. A collective of the data- and context-parallel ranks.

    Under ``overlap_param_gather`` an optimizer step leaves each rank with its own share of the new weights, and hooks
    gather the others just before a module of the next forward pass. Whoever reads weights otherwise calls this first.
    """
    if ddp.ddp_config.overlap_param_gather:
        ddp.start_param_sync(force_sync=True)


def step_by_norm(optimizer: MegatronOptimizer, grad_norm: float) -> None:
    """Take an optimizer step whose gradients are clipped by their norm, which is known. A collective of all ranks.

    megatron-core's chain of optimizers asks itself for the norm, however lately it was computed: a pass over all
    gradients and a reduction that it is spared here. Source: ``ChainedOptimizer.step``; ``tests/contract`` holds it.

    Args:
        optimizer: the optimizer, whose gradients are prepared.
        grad_norm: what its ``get_grad_norm`` returned for these gradients.
    """
    chain: Any = optimizer
    chain.get_grad_norm = lambda: grad_norm  # of this object alone, in front of its class's
    try:
        chain.step()
    finally:
        del chain.get_grad_norm


def gather_gradients(ddp: DistributedDataParallel) -> None:
    """Complete every ``main_grad``. A collective of the data- and context-parallel ranks.

    With the distributed optimizer, the reduction leaves each rank with its own share of the summed gradient, which is
    all that its update needs; the rest of ``main_grad`` is a partial sum. Whoever reads gradients calls this first.
    """
    if not ddp.ddp_config.use_distributed_optimizer:
        return
    group: Any = ddp.intra_dp_cp_group
    for buffer in _buffers(ddp):
        for bucket in buffer.buckets:
            shares = bucket.grad_data.view(group.size(), -1)
            dist.all_gather(list(shares.unbind()), shares[group.rank()].clone(), group=group)


def _buffers(ddp: DistributedDataParallel) -> list[Any]:
    return [*ddp.buffers, *ddp.expert_parallel_buffers]  # pyright: ignore[reportGeneralTypeIssues]


def build_optimizer(
    model: DistributedDataParallel, dtype: torch.dtype, settings: recipe.Optimizer
) -> MegatronOptimizer:
    """Build AdamW with global-norm clipping; biases and norms have no weight decay (megatron-core's standard).

    Args:
        model: the wrapped model; its ``ddp_config`` says whether the optimizer's state is sharded and whether updated
            weights are gathered late.
        dtype: dtype of the weights.
        settings: the recipe's ``policy.megatron_cfg.optimizer``.
    """
    config = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.min_lr,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_beta1,
        adam_beta2=settings.adam_beta2,
        adam_eps=settings.adam_eps,
        clip_grad=settings.clip_grad,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=model.ddp_config.use_distributed_optimizer,
        overlap_param_gather=model.ddp_config.overlap_param_gather,
        fp8_recipe=model.config.fp8_recipe if model.config.fp8 else None,
    )
    optimizer = get_megatron_optimizer(
        config=config,
        model_chunks=[model],
        config_overrides=get_standard_config_overrides(config=config),
        pg_collection=None,  # parallel_state's groups: the same ones, with their gloo twins
    )
    _fuse_on_cpu(single(optimizer).optimizer)
    return optimizer


def _fuse_on_cpu(adam: torch.optim.Optimizer) -> None:
    """Let torch's AdamW update a tensor in one pass; left alone, it makes a dozen operations of it on a CPU.

    megatron-core has no setting for it. On a GPU it builds Transformer Engine's or apex's optimizer, or torch's with
    operations over all tensors.
    """
    for group in adam.param_groups:
        if all(parameter.device.type == "cpu" for parameter in group["params"]):
            group["fused"] = True


def build_scheduler(
    optimizer: MegatronOptimizer, settings: recipe.Optimizer, schedule: recipe.Scheduler, max_steps: int
) -> OptimizerParamScheduler:
    """Build the schedule of the learning rate, counted in optimizer steps.

    Args:
        optimizer: the optimizer whose learning rate it sets.
        settings: the recipe's ``policy.megatron_cfg.optimizer``: peak and final learning rate, weight decay.
        schedule: the recipe's ``policy.megatron_cfg.scheduler``.
        max_steps: number of optimizer steps of the whole run; the length of the decay unless the recipe sets one.
    """
    decay_steps = schedule.lr_decay_steps if schedule.lr_decay_steps is not None else max_steps
    return OptimizerParamScheduler(
        optimizer=optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.min_lr,
        lr_warmup_steps=schedule.lr_warmup_steps,
        lr_decay_steps=max(decay_steps, schedule.lr_warmup_steps + 1),
        lr_decay_style=schedule.lr_decay_style,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
