# SPDX-License-Identifier: Apache-2.0
"""Rehearses one rank of one pipeline stage: the real policy on fake tensors, in a fake world."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_g2rpo.commands.rehearsal.fakes import fake_world, without_values
from megatron_g2rpo.commands.rehearsal.ledger import Ledger, Message
from megatron_g2rpo.commands.rehearsal.rows import packed_row
from megatron_g2rpo.models.directory import load_config
from megatron_g2rpo.plan.rows import MicroBatches
from megatron_g2rpo.policy.device import select
from megatron_g2rpo.policy.layouts.layout import layout_of
from megatron_g2rpo.policy.megatron import LossTerms, MegatronPolicy
from megatron_g2rpo.recipe import Policy, Recipe, TrainRecipe
from megatron_g2rpo.types import PackedBatch, TokenStats


class RehearsalError(ValueError):
    """A stage of the recipe cannot be built or run; the message names the stage and what it was doing."""


@dataclass(frozen=True)
class Traffic:
    """The messages of one kind of collective in one kind of process group.

    Attributes:
        collective: name of the collective, as in ``plan.wire``.
        group: the group's name and number of ranks, as in ``plan.wire``.
        count: number of messages.
        payload: bytes of their whole tensors, together.
        sent: bytes that one rank sends, with ring algorithms.
        payloads: (payload, number of such messages), the largest first.
    """

    collective: str
    group: str
    count: int
    payload: int
    sent: int
    payloads: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class StageRehearsal:
    """The bytes and messages of one rank of a pipeline stage, counted.

    Attributes:
        stage: number of the pipeline stage, from 0.
        rank: the global rank that was rehearsed.
        micro_batches: number of micro-batches that it ran.
        weights, gradients, optimizer: bytes of the model's weights; of gradient buffers, and the float32 copies of
            gradients that the optimizer keeps; of the optimizer's state and master weights.
        activations: most bytes that forward passes left alive for the backward passes, with their inputs and outputs.
        peak: most bytes at once in forward and backward passes, beside what was alive before.
        optimizer_peak: most bytes at once in the optimizer step, beside weights, gradients and its state.
        traffic: what the rank sent in log-probability pass, update and optimizer step.
        seconds: wall-clock time of the rehearsal.
    """

    stage: int
    rank: int
    micro_batches: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    peak: int
    optimizer_peak: int
    traffic: tuple[Traffic, ...]
    seconds: float


def rehearse(recipe: Recipe, model_dir: str, batches: MicroBatches) -> list[StageRehearsal]:
    """Rehearse the first, a middle and the last pipeline stage, one after the other.

    Each runs as many micro-batches as the first stage holds at once.

    Args:
        recipe: the recipe.
        model_dir: directory of the model's config.json.
        batches: the micro-batches of an optimizer step; all are of the full row.

    Raises:
        RehearsalError: a stage cannot be built or run.
    """
    stages = layout_of(recipe.policy.megatron_cfg).pipeline
    settings = rehearsed_settings(recipe.policy, model_dir)
    row = packed_row(batches.row, load_config(model_dir), recipe.policy.generation.max_new_tokens)
    count, logprobs = min(stages, batches.count), isinstance(recipe, TrainRecipe)
    return [
        rehearse_stage(settings, recipe.world_size, stage, row, count, logprobs=logprobs)
        for stage in sorted({0, stages // 2, stages - 1})
    ]


class _RehearsedPolicy(MegatronPolicy):
    """The policy without weights and without numbers: what it asks a value of is left out."""

    def load(self, tensors: Mapping[str, Tensor], source: str, on_loaded: Any = None) -> None:
        """Load nothing: fake tensors have no values."""

    def _initial_weights(self, seed: int) -> Mapping[str, Tensor]:
        return {}

    def _means(self, terms: Sequence[Mapping[str, Tensor]]) -> dict[str, float]:
        return {}


def rehearsed_settings(settings: Policy, model_dir: str) -> Policy:
    """Return a recipe's policy with what a machine without a GPU can build: local layers, no fused kernels, no FP8.

    Args:
        settings: the recipe's ``policy`` section.
        model_dir: directory of the model's config.json.
    """
    megatron = settings.megatron_cfg.model_copy(
        update={
            "transformer_impl": "local",
            "core_attention": "local",
            "apply_rope_fusion": False,
            "bias_activation_fusion": False,
            "gradient_accumulation_fusion": False,
            "fp8_cfg": settings.megatron_cfg.fp8_cfg.model_copy(update={"enabled": False}),
            "first_last_layers_bf16": False,
        }
    )
    return settings.model_copy(
        update={"megatron_cfg": megatron, "model_name": model_dir, "init": "pretrained", "pretrained_checkpoint": None}
    )


def rehearse_stage(
    settings: Policy, world_size: int, stage: int, batch: PackedBatch, micro_batches: int, *, logprobs: bool
) -> StageRehearsal:
    """Build one rank of a stage and let it take one optimizer step, on tensors without values.

    Args:
        settings: what ``rehearsed_settings`` returns.
        world_size: number of ranks of the layout.
        stage: number of the pipeline stage; of its ranks, the first is rehearsed.
        batch: the whole packed row that every micro-batch is; of its pixels only the shape is read.
        micro_batches: number of micro-batches of the optimizer step.
        logprobs: whether a pass for log-probabilities comes before, as in G2RPO.

    Raises:
        RehearsalError: the stage cannot be built or run.
    """
    begin = time.monotonic()
    stages = settings.megatron_cfg.pipeline_model_parallel_size
    rank = stage * (world_size // stages)
    ledger = Ledger()
    with fake_world(rank, world_size), without_values(), ledger:
        rehearsal = _Rehearsal(settings, ledger, f"stage {stage} of {stages} (rank {rank} of {world_size})")
        found = rehearsal.run(batch, micro_batches, logprobs=logprobs)
        traffic = _by_group(ledger.messages, rehearsal.groups())
    return StageRehearsal(
        stage=stage,
        rank=rank,
        micro_batches=micro_batches,
        traffic=traffic,
        seconds=time.monotonic() - begin,
        **found,
    )


class _Rehearsal:
    def __init__(self, settings: Policy, ledger: Ledger, where: str) -> None:
        self.ledger, self.where = ledger, where
        with self._doing("building the model, its gradient buffers and its optimizer"):
            self.policy = _RehearsedPolicy(settings, select("cpu"), seed=0, max_steps=1)
        ledger.messages.clear()  # tied embeddings are made equal once, when they are built
        # Every row has one length: peers need not tell each other the shapes of what they send.
        self.policy.config.variable_seq_lengths = False

    @contextmanager
    def _doing(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            raise RehearsalError(f"{self.where}: {what}: {type(error).__name__}: {error}") from error

    def run(self, batch: PackedBatch, micro_batches: int, *, logprobs: bool) -> dict[str, int]:
        """Return the counted fields of ``StageRehearsal``."""
        policy, ledger = self.policy, self.ledger
        batch = replace(batch, pixel_values=torch.zeros(batch.pixel_values.shape))
        batches = [batch] * micro_batches
        if logprobs:
            with self._doing("log-probabilities (forward pass without gradient)"):
                policy.logprobs(batches)
        base = ledger.held
        ledger.restart()
        with self._doing("update (forward and backward pass)"), _after_forward(policy, ledger) as alive:
            policy.gradients(batches, _loss)
        # Beside the micro-batches' index tensors, which were there before.
        # One micro-batch's: what closures of recomputation of the one before still hold is not the next one's.
        counted = alive if self.policy.groups.pipeline_size > 1 else alive[:1]
        found = {"activations": max(counted) - base, "peak": ledger.peak - base}
        with self._doing("optimizer step"):
            optimizer_peak = self._optimizer_step()
        return {**found, **self._state(), "optimizer_peak": optimizer_peak}

    def _optimizer_step(self) -> int:
        policy, ledger = self.policy, self.ledger
        _, optimizer, _ = policy._training()
        with policy.device.megatron():
            optimizer.prepare_grads()
            ledger.restart()
            optimizer.step_with_ready_grads()
        return ledger.peak - ledger.held

    def _state(self) -> dict[str, int]:
        ddp, optimizer, _ = self.policy._training()
        weights = _storages(parameter.data for parameter in self.policy.model.parameters())
        buffers: list[Any] = list(ddp.buffers)  # pyright: ignore[reportArgumentType]
        gradients = _storages(buffer.grad_data for buffer in buffers)
        state: list[Tensor] = []
        for one in getattr(optimizer, "chained_optimizers", [optimizer]):
            for group in one.optimizer.param_groups:
                for parameter in group["params"]:
                    state += [v for name, v in one.optimizer.state[parameter].items() if name != "step"]
                    state.append(parameter.data)
                    if parameter.grad is not None:
                        gradients.update(_storages([parameter.grad]))
        kept = {key: size for key, size in _storages(state).items() if key not in weights}
        return {
            "weights": sum(weights.values()),
            "gradients": sum(gradients.values()),
            "optimizer": sum(kept.values()),
        }

    def groups(self) -> dict[str, str]:
        """Return what a plan calls the process groups, by torch's name."""
        groups = self.policy.groups
        named: list[tuple[Any, str]] = [
            (dist.group.WORLD, "all"),
            (groups.collection.embd, "first and last stage"),
            (groups.row, "tensor x context"),
            (groups.data_context, "data x context"),
            (groups.pipeline, "pipeline"),
            (groups.context, "context"),
            (groups.tensor, "tensor"),
        ]
        return {group.group_name: name for group, name in named if group is not None}


@contextmanager
def _after_forward(policy: MegatronPolicy, ledger: Ledger) -> Iterator[list[int]]:
    """Note the bytes that are alive after each forward pass of the model."""
    alive: list[int] = []
    handle = policy.model.register_forward_hook(lambda *_: alive.append(ledger.held))
    try:
        yield alive
    finally:
        handle.remove()


def _loss(batch: PackedBatch, stats: TokenStats) -> LossTerms:
    """Return a loss in which every label's log-probability and entropy has a gradient."""
    return LossTerms(loss=((stats.logprobs + stats.entropy) * batch.loss_mask).sum(), num_tokens=1, sums={})


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage._cdata: storage.nbytes() for storage in storages if storage.nbytes()}


def _by_group(messages: Counter[Message], names: Mapping[str, str]) -> tuple[Traffic, ...]:
    lines: dict[tuple[str, str], list[tuple[Message, int]]] = {}
    for message, count in messages.items():
        group = f"{names.get(message.group, message.group)} ({message.ranks})"
        lines.setdefault((message.collective, group), []).append((message, count))
    return tuple(
        Traffic(
            collective=collective,
            group=group,
            count=sum(count for _, count in line),
            payload=sum(count * message.payload for message, count in line),
            sent=round(sum(count * message.sent for message, count in line)),
            payloads=tuple(sorted(((message.payload, count) for message, count in line), reverse=True)),
        )
        for (collective, group), line in sorted(lines.items())
    )
