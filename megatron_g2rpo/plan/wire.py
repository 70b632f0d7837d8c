# SPDX-License-Identifier: Apache-2.0
"""Bytes that one rank sends, by collective, with ring algorithms.

A ring over n ranks sends ``(n - 1) / n`` of the whole tensor per rank in an all-gather or a reduce-scatter, and twice
that in an all-reduce, which is one after the other. Small messages (counts, metrics, statistics of a few numbers a
token, the responses of rollouts) are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_g2rpo.plan import fp8, vision
from megatron_g2rpo.plan.activations import Recompute
from megatron_g2rpo.plan.buffers import ddp_buffer
from megatron_g2rpo.plan.kept import data_parallelism, element_bytes, recompute_of
from megatron_g2rpo.plan.model import Model
from megatron_g2rpo.plan.rows import MicroBatches
from megatron_g2rpo.plan.sizes import LOCAL, Sizes, modules_of, sizes
from megatron_g2rpo.policy.layouts.image_shares import largest_share
from megatron_g2rpo.policy.layouts.layout import Layout
from megatron_g2rpo.recipe import Recipe, TrainRecipe

OPTIMIZER_STEP = "optimizer step"
ROLLOUT_STEP = "rollout step"
KEYS_AND_VALUES = "keys and values"  # what is sent while attention computes, where the recipe says so


@dataclass(frozen=True)
class Traffic:
    """The bytes that one rank sends for one purpose, by one collective.

    Attributes:
        what: what is sent.
        collective: name of the collective.
        group: the group of ranks that take part, and their number.
        per: how often it is sent: every optimizer step, or every rollout step (which may have several).
        sent: number of bytes that one rank sends.
    """

    what: str
    collective: str
    group: str
    per: str
    sent: int


def ring_gather(ranks: int, whole: float) -> float:
    """Return the bytes that a rank sends in a ring all-gather (or reduce-scatter) of ``whole`` bytes."""
    return whole * (ranks - 1) / ranks


def ring_reduce(ranks: int, whole: float) -> float:
    """Return the bytes that a rank sends in a ring all-reduce of ``whole`` bytes."""
    return 2 * ring_gather(ranks, whole)


def stage_traffic(
    recipe: Recipe, model: Model, layout: Layout, batches: MicroBatches, stage: int, *, passes: float
) -> list[Traffic]:
    """Return what a rank of a pipeline stage sends; entries that send nothing are left out.

    Args:
        recipe: the recipe.
        model: the model's parameters.
        layout: the parallel sizes.
        batches: the micro-batches of an optimizer step.
        stage: number of the pipeline stage.
        passes: number of forward passes without gradient over these micro-batches, see ``plan.passes``.
    """
    account = _Account(recipe, model, layout, batches, stage, passes)
    lines = [*account.tensor(), *account.context(), *account.pipeline(), *account.vision(), *account.gradients()]
    return [line for line in [*lines, *account.weights()] if line.sent]


class _Account:
    def __init__(
        self, recipe: Recipe, model: Model, layout: Layout, batches: MicroBatches, stage: int, passes: float
    ) -> None:
        self.recipe, self.model, self.layout, self.batches, self.stage = recipe, model, layout, batches, stage
        self.nbytes = element_bytes(recipe)
        self.first, self.last = stage == 0, stage == layout.pipeline - 1
        text = model.config.get_text_config()
        self.layers = layout.stage_layers(text.num_hidden_layers)[stage]
        # All micro-batches of an optimizer step as one long row: volumes are linear in tokens.
        self.size: Sizes = sizes(text, layout, batches.tokens, self.nbytes, modules_of(recipe, model.config))
        self.forwards = 1 + passes
        self.parameters = model.stage_parameters(layout, stage, freeze_vision=recipe.policy.megatron_cfg.freeze_vision)
        self.parallelism = data_parallelism(recipe, layout)

    def _line(self, what: str, collective: str, group: str, sent: float, per: str = OPTIMIZER_STEP) -> Traffic:
        return Traffic(what, collective, group, per, round(sent))

    def _recomputed_layers(self) -> int:
        recompute: Recompute = recompute_of(self.recipe)
        chunks, _ = recompute.chunks(self.layers)
        return sum(chunks)

    def tensor(self) -> Iterator[Traffic]:
        """Iterate over what tensor parallelism sends, or sequence parallelism in its place."""
        ranks, size = self.layout.tensor, self.size
        if ranks == 1:
            return
        group, hidden = f"tensor ({ranks})", self.nbytes * size.tokens * size.hidden
        forward = self.layers * self.forwards + self._recomputed_layers()
        if self.layout.sequence_parallel:
            # Forward, each of attention and MLP: gather before, scatter after. Backward: the inputs once more, and the
            # adjoint of both.
            gathers, scatters = 2 * forward + 4 * self.layers, 2 * forward + 2 * self.layers
            yield self._line("layers", "all-gather", group, gathers * ring_gather(ranks, hidden))
            yield self._line("layers", "reduce-scatter", group, scatters * ring_gather(ranks, hidden))
        else:
            reductions = 2 * forward + 2 * self.layers
            yield self._line("layers", "all-reduce", group, reductions * ring_reduce(ranks, hidden))
        if self.model.config.get_text_config().num_key_value_heads < ranks:
            whole = self.nbytes * size.tokens * size.projected * size.head_dim
            yield self._line("shared key/value heads", "all-gather", group, forward * ring_gather(ranks, whole))
            yield self._line("shared key/value heads", "reduce-scatter", group, self.layers * ring_gather(ranks, whole))
        if self.first:
            yield self._line("embedding", "all-reduce", group, self.forwards * ring_reduce(ranks, hidden))
            if self.layout.sequence_parallel:
                levels = 1 + (self._levels() if self.batches.row.images else 0)
                yield self._line("embedding", "all-gather", group, levels * ring_gather(ranks, hidden))
        if self.last:
            if self.layout.sequence_parallel:
                yield self._line("output layer", "all-gather", group, self.forwards * ring_gather(ranks, hidden))
                yield self._line("output layer", "reduce-scatter", group, ring_gather(ranks, hidden))
            else:
                yield self._line("output layer", "all-reduce", group, ring_reduce(ranks, hidden))
        summed = sum(p.numel for p in self.parameters if p.trains and (p.is_vision or p.sequence_parallel))
        sent = ring_reduce(ranks, self.parallelism.grad_bytes * summed)
        yield self._line("gradients of replicated weights", "all-reduce", group, sent)

    def context(self) -> Iterator[Traffic]:
        """Iterate over what context parallelism sends: keys and values.

        The local core attention gathers them, and so does Transformer Engine's where rows have branches; in other rows
        it passes them on as ``cp_comm_type`` says.
        """
        ranks, size = self.layout.context, self.size
        if ranks == 1:
            return
        group, what = f"context ({ranks})", KEYS_AND_VALUES
        if self.size.modules.attention == LOCAL or max(self.batches.row.parents) >= 0:
            what = f"{KEYS_AND_VALUES}, gathered first"
        whole = self.nbytes * size.tokens * ranks * 2 * size.groups * size.head_dim
        selective = self.recipe.policy.megatron_cfg.recompute_granularity == "selective"
        again = self.layers if selective else self._recomputed_layers()
        gathers = self.layers * self.forwards + again
        yield self._line(what, "all-gather", group, gathers * ring_gather(ranks, whole))
        yield self._line(what, "reduce-scatter", group, self.layers * ring_gather(ranks, whole))

    def pipeline(self) -> Iterator[Traffic]:
        """Iterate over what pipeline parallelism sends: hidden states forward, their gradients backward."""
        hidden, group = self.nbytes * self.size.shared * self.size.hidden, f"pipeline ({self.layout.pipeline})"
        if not self.last:
            yield self._line("hidden states", "send", group, self.forwards * hidden)
        if not self.first:
            yield self._line("gradients of hidden states", "send", group, hidden)
        shared = self.parallelism.grad_bytes * sum(p.numel for p in self.parameters if p.shared and p.trains)
        yield self._line("gradient of the tied embedding", "all-reduce", "first and last stage (2)", shared)

    def vision(self) -> Iterator[Traffic]:
        """Iterate over what image features send: tensor- and context-parallel peers each encode a share of them."""
        peers, images = self.layout.tensor * self.layout.context, self.batches.row.images
        if not self.first or peers == 1 or not images:
            return
        # The gather pads every peer's share to the largest.
        tokens = largest_share(images, peers) * peers * (self.batches.images / len(images))
        whole = tokens * vision.features(vision.geometry_of(self.model.config), 1, self.nbytes)
        group = f"tensor x context ({peers})"
        yield self._line("image features", "all-gather", group, self.forwards * ring_gather(peers, whole))
        if not self.recipe.policy.megatron_cfg.freeze_vision:
            yield self._line("image features", "reduce-scatter", group, ring_gather(peers, whole))

    def gradients(self) -> Iterator[Traffic]:
        """Iterate over what data parallelism sends over data- and context-parallel ranks, once an optimizer step."""
        ranks, buffer = self.parallelism.size, ddp_buffer(self.parameters, self.parallelism, self.stage)
        if ranks == 1:
            return
        group, gradients = f"data x context ({ranks})", self.parallelism.grad_bytes * buffer.numel
        if not self.parallelism.distributed_optimizer:
            yield self._line("gradients", "all-reduce", group, ring_reduce(ranks, gradients))
            return
        yield self._line("gradients", "reduce-scatter", group, ring_gather(ranks, gradients))
        layers, options = self.model.config.get_text_config().num_hidden_layers, self.recipe.policy.megatron_cfg
        saved = fp8.weights(self.parameters, layers, options, self.size.modules).saved
        yield self._line("updated weights", "all-gather", group, ring_gather(ranks, self.nbytes * buffer.numel - saved))

    def weights(self) -> Iterator[Traffic]:
        """Iterate over what the weights for the rollout engines send: every rank receives every tensor."""
        if not isinstance(self.recipe, TrainRecipe):
            return
        tensor, pipeline = self.layout.tensor, self.layout.pipeline
        shards, sharded = 0, 0
        for stage in range(pipeline):
            held = self.model.stage_parameters(self.layout, stage, freeze_vision=False)
            kept = [p for p in held if not (p.shared and stage > 0)]  # a copy is not streamed again
            shards += sum(p.numel for p in kept)
            sharded += sum(p.numel for p in kept if not p.replicated)
        if pipeline > 1:
            # A chain passes each shard from its stage on to all others: every rank but the last sends it once.
            sent = ring_gather(pipeline, self.nbytes * shards)
            yield self._line("weights to the engine", "broadcast", f"pipeline ({pipeline})", sent, ROLLOUT_STEP)
        if tensor > 1:
            sent = ring_gather(tensor, self.nbytes * sharded * tensor)
            yield self._line("weights to the engine", "all-gather", f"tensor ({tensor})", sent, ROLLOUT_STEP)

    def _levels(self) -> int:
        return vision.geometry_of(self.model.config).levels


def total(lines: list[Traffic], per: str) -> int:
    """Return the bytes that a rank sends every optimizer step, or in addition every rollout step, as ``per`` says."""
    return sum(line.sent for line in lines if line.per == per)
