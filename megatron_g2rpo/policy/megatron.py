# SPDX-License-Identifier: Apache-2.0
"""The Megatron policy: log-probabilities of packed rows, optimizer steps on them, and its weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from megatron_g2rpo import models, weights
from megatron_g2rpo.models import flops
from megatron_g2rpo.models.directory import load_config
from megatron_g2rpo.models.vision_cache import VisionCache
from megatron_g2rpo.policy import quantized, sharded_state
from megatron_g2rpo.policy.config import transformer_config
from megatron_g2rpo.policy.device import Device
from megatron_g2rpo.policy.environment import check_environment
from megatron_g2rpo.policy.fp8 import unmoved_scales
from megatron_g2rpo.policy.kernels import check_heads, check_training, choose
from megatron_g2rpo.policy.layouts.layout import check_model, layout_of
from megatron_g2rpo.policy.loss_terms import Loss, LossTerms, global_means
from megatron_g2rpo.policy.machine import this_machine
from megatron_g2rpo.policy.model import PolicyModel
from megatron_g2rpo.policy.named_weights import NamedWeights
from megatron_g2rpo.policy.optimizer import (
    build_optimizer,
    build_scheduler,
    check_normalisation,
    schedule_functions,
    step_by_norm,
    wait_for_parameters,
    wrap_ddp,
)
from megatron_g2rpo.policy.passes import Passes
from megatron_g2rpo.policy.process_groups import ParallelGroups, initialize
from megatron_g2rpo.policy.work import Work
from megatron_g2rpo.recipe import MegatronConfig, Policy
from megatron_g2rpo.types import DTYPES, PackedBatch, TokenStats
from megatron_g2rpo.weights.hf_model import model_class

# on_stats(stats): what ``logprobs`` would have returned for the rows before an update, from the update's own forward
# pass. It is called on every rank.
OnStats = Callable[[list[TokenStats]], None]

__all__ = ["Loss", "LossTerms", "MegatronPolicy", "OnStats"]


class MegatronPolicy:
    """A policy on megatron-core, vision-language or text-only, at any layout.

    Args:
        settings: the recipe's ``policy`` section.
        device: this rank's device.
        seed: seed of random initialisation and of megatron-core's random state.
        max_steps: number of optimizer steps of the whole run; None builds no optimizer (inference only).
        banned_token_ids: ids that the rollout engine never samples: the policy is the distribution over the others.
        on_loaded: callback(num_bytes), called after each parameter that was loaded from a Hugging Face directory.
        vision_cache: features of images, which the rollout engine of this process may share; it hears of every change
            of the vision tower's weights. None: images are encoded anew in every pass.

    Attributes:
        vision_cache: as given.
        shape: what its FLOPs are counted by.
        work: what its passes have computed so far, the same on every rank of a replica.

    Raises:
        LayoutError: the model cannot be split as the recipe asks.
        KernelError: the machine lacks kernels that the recipe asks for.
        DeviceError: the recipe's environment variables are not set.
        CheckpointError: the weights of ``policy.model_name`` do not fit its config.
    """

    def __init__(
        self,
        settings: Policy,
        device: Device,
        *,
        seed: int,
        max_steps: int | None,
        banned_token_ids: Sequence[int] = (),
        on_loaded: sharded_state.Advance | None = None,
        vision_cache: VisionCache | None = None,
    ) -> None:
        self.vision_cache, self.work = vision_cache, Work.none()
        self.settings, self.device = settings, device
        check_environment(settings.megatron_cfg.env_vars)
        self.hf_config = load_config(settings.model_name)
        self.layout = layout_of(settings.megatron_cfg)
        check_model(self.hf_config, settings.megatron_cfg)
        machine = this_machine(device)
        self.kernels = choose(settings, self.layout, machine)
        check_heads(self.kernels, self.layout, self.hf_config)
        if max_steps is not None:
            check_training(self.kernels, machine)
        self.groups: ParallelGroups = initialize(device, self.layout, seed)
        self.dtype = DTYPES[settings.precision]
        self.shape = flops.shape_of(self.hf_config)
        self.config = transformer_config(self.hf_config, self.layout, self.dtype, settings.megatron_cfg, self.kernels)
        self._ddp: DistributedDataParallel | None = None
        self.optimizer: MegatronOptimizer | None = None
        self.scheduler: OptimizerParamScheduler | None = None
        megatron_cfg = settings.megatron_cfg
        overlap = megatron_cfg.distributed_data_parallel_config.overlap_grad_reduce
        with device.megatron():
            self.model = PolicyModel(
                self.config,
                self.hf_config,
                self.groups.collection,
                device=device.torch_device,
                kernels=self.kernels,
                banned_token_ids=banned_token_ids,
                chunk_size=settings.logprob_chunk_size,
                vision_every_row=overlap and max_steps is not None and not megatron_cfg.freeze_vision,
                vision_cache=vision_cache,
            ).to(device.torch_device)
            self._named_weights = NamedWeights(
                model=self.model,
                table=models.family(self.hf_config.model_type).weights(self.hf_config),
                groups=self.groups,
                layer_offset=sum(self.layout.stage_layers(self.config.num_layers)[: self.groups.pipeline_rank]),
            )
            if settings.pretrained_checkpoint is None:
                self.load(self._initial_weights(seed), source=settings.model_name, on_loaded=on_loaded)
            else:
                sharded_state.load_weights(self.model, settings.pretrained_checkpoint, self.dtype)
            if megatron_cfg.freeze_vision and self.model.vision_model is not None:
                self.model.vision_model.requires_grad_(False)
            if max_steps is not None:
                self._prepare_training(megatron_cfg, max_steps)
        trained = self.model if self._ddp is None else self._ddp
        self._passes = Passes(module=trained, device=device, groups=self.groups, work=self.work)

    def _prepare_training(self, megatron_cfg: MegatronConfig, max_steps: int) -> None:
        ddp = wrap_ddp(self.model, self.config, megatron_cfg.distributed_data_parallel_config, self.groups.collection)
        optimizer = build_optimizer(ddp, self.dtype, megatron_cfg.optimizer)
        keeps_graphs = self.vision_cache is not None and self.vision_cache.graphs is not None
        complete = self.model.finish_vision_backward if keeps_graphs else None
        schedule_functions(self.config, ddp, optimizer, after_backward=complete)
        check_normalisation(self.config, ddp)
        self._ddp, self.optimizer = ddp, optimizer
        self.scheduler = build_scheduler(optimizer, megatron_cfg.optimizer, megatron_cfg.scheduler, max_steps)

    def _training(self) -> tuple[DistributedDataParallel, MegatronOptimizer, OptimizerParamScheduler]:
        if self._ddp is None or self.optimizer is None or self.scheduler is None:
            raise RuntimeError("this policy was built without an optimizer (max_steps=None)")
        return self._ddp, self.optimizer, self.scheduler

    def _initial_weights(self, seed: int) -> Mapping[str, Tensor]:
        if self.settings.init == "pretrained":
            return weights.SafetensorsDirectory(self.settings.model_name)
        with torch.random.fork_rng(devices=[]):  # the same weights on every rank, whatever the layout
            torch.manual_seed(seed)
            state = model_class(self.hf_config).from_config(self.hf_config, trust_remote_code=False).state_dict()
        return state

    # -- weights ------------------------------------------------------------------------------------------------

    def load(self, tensors: Mapping[str, Tensor], source: str, on_loaded: sharded_state.Advance | None = None) -> None:
        """Load full tensors by Hugging Face name; see ``weights.load``."""
        self._named_weights.load(tensors, source, on_loaded)
        self._vision_changed()
        if self.optimizer is not None:
            with self.device.megatron():
                self.optimizer.reload_model_params()  # fp32 main copies under bf16

    def stream(self, tensor_of: Callable[[torch.nn.Parameter], Tensor] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Iterate over the weights as ``(hf_name, full_tensor)``. A collective of the replica.

        Every rank of the replica receives every tensor; see ``weights.stream``. Values of FP8 weights are those from
        before quantisation, which a collective of the data-parallel ranks gathers.

        Args:
            tensor_of: what to stream of each parameter in place of its value, for example its gradient.
        """
        self._wait_for_parameters()
        return self._named_weights.stream(
            tensor_of or quantized.value_of(self.optimizer),
            None if tensor_of else lambda parameter: parameter.dtype,
        )

    def specs(self) -> dict[str, Tensor]:
        """Return what ``stream`` yields, on the meta device. A collective of the replica."""
        return self._named_weights.specs()

    def source(self) -> weights.WeightSource:
        """Return the weights in the form that a rollout engine loads."""
        return weights.WeightSource(self.specs, self.stream)

    def local_weights(self) -> list[Tensor]:
        """Return this rank's current shards of all parameters; writing to them changes the model.

        A collective of the data- and context-parallel ranks. The optimizer's own copies are not touched: weights that
        were written must be put back before the next update. Whoever writes says so, ``weights_written``.
        """
        self._wait_for_parameters()
        return list(self.model.parameters())

    def weights_written(self) -> None:
        """Hear that ``local_weights`` were written to. A vision tower that does not learn is taken to be as before."""
        if not self.settings.megatron_cfg.freeze_vision:
            self._vision_changed()

    def _vision_changed(self) -> None:
        """Let features of images be forgotten; on every stage, because the engine of each rank may have some."""
        if self.vision_cache is not None:
            self.vision_cache.weights_changed()

    def _wait_for_parameters(self) -> None:
        if self._ddp is not None:
            with self.device.megatron():
                wait_for_parameters(self._ddp)

    def sharded_state_dict(self, *, is_loading: bool = False) -> dict[str, Any]:
        """Return weights, optimizer and schedule as megatron-core's sharded state, which no layout is tied to.

        Args:
            is_loading: whether the result is a template to load into.
        """
        self._wait_for_parameters()
        return sharded_state.sharded_state_dict(self.model, self.optimizer, self.scheduler, is_loading=is_loading)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``dist_checkpointing.load`` returned for ``sharded_state_dict(is_loading=True)``."""
        sharded_state.load_state_dict(self.model, self.optimizer, self.scheduler, state)
        self._vision_changed()
        if self._ddp is not None and self.config.fp8_param:
            self._ddp.start_param_sync(force_sync=True)

    # -- computation --------------------------------------------------------------------------------------------

    def logprobs(self, batches: Sequence[PackedBatch], temperature: float = 1.0) -> list[TokenStats]:
        """Compute per-token log-probabilities and entropies, without gradient. A collective of the replica.

        Args:
            batches: packed rows; every rank of a replica passes the same.
            temperature: temperature of the policy's distribution.

        Returns:
            One ``TokenStats`` per row, for the whole row, on the CPU, on every rank of the replica.
        """
        self.model.eval()
        with torch.no_grad(), unmoved_scales(self.model):
            shares = self._passes.forward(batches, temperature)
        self.model.train()
        return self._passes.whole_rows(batches, shares)

    def update(
        self,
        batches: Sequence[PackedBatch],
        loss: Loss,
        temperature: float = 1.0,
        *,
        skips: Callable[[float, float], bool] | None = None,
        on_stats: OnStats | None = None,
    ) -> dict[str, float]:
        """Take one optimizer step on the global minibatch. A collective of all ranks.

        Args:
            batches: this data-parallel rank's micro-batches; every rank passes the same number of them.
            loss: see ``Loss``. The gradient is that of (global sum of losses) / (global sum of token counts).
            temperature: temperature of the distribution whose log-probabilities the loss gets.
            skips: says of loss and gradient norm whether this step is not taken, the same on all ranks; weights,
                optimizer and schedule then stay as they are. None: a norm that is not finite raises.
            on_stats: function that is called, before the step is taken or skipped, with the rows' log-probabilities and
                entropies under the weights that the update starts from: whole rows, on the CPU, as ``logprobs`` would
                return them, without a pass of their own. Every rank passes one, or none does.

        Returns:
            ``loss``, ``grad_norm`` (before clipping), ``lr``, ``num_tokens``, and the loss's metrics, each a global sum
            divided by the global token count; with ``skips``, also ``skipped_updates``, 0 or 1, and of a skipped step
            only what is finite.

        Raises:
            FloatingPointError: the gradient norm is not finite; no step was taken.
        """
        _, optimizer, scheduler = self._training()
        # Before step(), which would clip by a norm that is not finite, and write it into every weight.
        metrics = self.gradient_norm(batches, loss, temperature, on_stats)
        if self.vision_cache is not None and self.vision_cache.graphs is not None:
            self.vision_cache.graphs.drop()  # also of a step that is not taken; before the optimizer takes its memory
        lr = {"lr": float(optimizer.param_groups[0]["lr"])}
        if skips is not None and skips(metrics["loss"], metrics["grad_norm"]):
            finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
            return {**finite, **lr, "skipped_updates": 1.0}
        if not math.isfinite(metrics["grad_norm"]):
            raise FloatingPointError(
                f"the gradient's norm is {metrics['grad_norm']} at loss {metrics['loss']}; no optimizer step was taken"
            )
        with self.device.megatron():
            step_by_norm(optimizer, metrics["grad_norm"])
        self.weights_written()
        scheduler.step(increment=1)
        return {**metrics, **lr, **({} if skips is None else {"skipped_updates": 0.0})}

    def gradient_norm(
        self,
        batches: Sequence[PackedBatch],
        loss: Loss,
        temperature: float = 1.0,
        on_stats: OnStats | None = None,
    ) -> dict[str, float]:
        """Return what ``update`` would return, except ``lr``, without taking the step.

        Gradients are left as ``update`` would use them; the arguments are those of ``update``. What is not finite is
        returned as it is.
        """
        _, optimizer, _ = self._training()
        sums = self.gradients(batches, loss, temperature, on_stats)
        with self.device.megatron():
            optimizer.prepare_grads()
            grad_norm = optimizer.get_grad_norm()
        return {**sums, "grad_norm": float(grad_norm)}

    def gradients(
        self,
        batches: Sequence[PackedBatch],
        loss: Loss,
        temperature: float = 1.0,
        on_stats: OnStats | None = None,
    ) -> dict[str, float]:
        """Fill ``main_grad`` of every parameter with the gradient of the global minibatch.

        With the distributed optimizer a rank has only its share of the gradient; ``optimizer.gather_gradients``
        completes it. The arguments are those of ``update``.

        Returns:
            ``loss``, ``num_tokens`` and the loss's metrics, as ``update`` returns them.
        """
        ddp, optimizer, _ = self._training()
        with self.device.megatron():
            ddp.zero_grad_buffer()
            optimizer.zero_grad()
            shares, terms = self._passes.backward(batches, loss, temperature)
        if on_stats is not None:
            on_stats(self._passes.whole_rows(batches, [share.cpu() for share in shares]))
        return self._means(terms)

    def _means(self, terms: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
        """Return ``global_means``; a policy of tensors without values overrides it."""
        return global_means(terms, self.groups)
