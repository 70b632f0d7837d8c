# SPDX-License-Identifier: Apache-2.0
"""Memory of each pipeline stage's rank: what it holds throughout, what each phase of a step adds, and the peak."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron_g2rpo.plan import activations, engine, vision
from megatron_g2rpo.plan.activations import FP32, Recompute, Sizes
from megatron_g2rpo.plan.buffers import DataParallelism, ModelState, model_state
from megatron_g2rpo.plan.model import Model, Parameter
from megatron_g2rpo.plan.rows import Assumptions, MicroBatches, Row, Slots, widest_slots
from megatron_g2rpo.policy.layouts.image_shares import largest_share
from megatron_g2rpo.policy.layouts.layout import Layout
from megatron_g2rpo.policy.layouts.logit_chunks import TILE_BYTES, LogitChunks
from megatron_g2rpo.recipe import Recipe, TrainRecipe
from megatron_g2rpo.types import DTYPES

# Assumed, not derived: the CUDA context, its libraries' workspaces and the buffers of NCCL's communicators; and what a
# caching allocator loses to fragmentation, as a share of what a phase allocates and frees.
FIXED_ALLOWANCE = 3_000_000_000
FRAGMENTATION = 0.05


@dataclass(frozen=True)
class StageMemory:
    """Memory of one rank of a pipeline stage, in bytes.

    Attributes:
        stage: number of the pipeline stage, from 0.
        layers: number of layers on the stage.
        state: bytes of weights, gradients and optimizer state.
        engine_weights: bytes of the rollout engine's copy of the model.
        in_flight: number of micro-batches whose activations are held at once.
        layer_activations: bytes that one micro-batch keeps of the language layers.
        vision_activations: bytes that one micro-batch keeps of the embedding and the vision tower.
        output_activations: bytes that one micro-batch keeps of the output layer.
        boundary: bytes of one micro-batch's input from the previous stage and output for the next stage.
        update_working: bytes that a forward or backward pass holds beside the kept activations, at most.
        optimizer_working: bytes that the optimizer step holds beside its state.
        cache: bytes of the key/value cache in generation; of vLLM that sleeps between generations, all that it takes.
        generation_working: bytes that prefill or decoding holds beside the cache.
        stream_working: bytes of the weights on their way to the rollout engine.
    """

    stage: int
    layers: int
    state: ModelState
    engine_weights: int
    in_flight: int
    layer_activations: int
    vision_activations: int
    output_activations: int
    boundary: int
    update_working: int
    optimizer_working: int
    cache: int
    generation_working: int
    stream_working: int

    @property
    def persistent(self) -> int:
        """Bytes that are held through the whole run."""
        return self.state.weights + self.state.gradients + self.state.optimizer + self.engine_weights

    @property
    def activations(self) -> int:
        """Bytes that are kept of all micro-batches in flight."""
        one = self.layer_activations + self.vision_activations + self.output_activations + self.boundary
        return self.in_flight * one

    @property
    def phases(self) -> dict[str, int]:
        """Bytes that each phase of a step adds to the persistent ones, by name; phases follow each other."""
        return {
            "generation": self.cache + self.generation_working,
            "weight stream": self.stream_working,
            "update": self.activations + self.update_working,
            "optimizer step": self.optimizer_working,
        }

    @property
    def phase(self) -> str:
        """Name of the phase that adds the most."""
        return max(self.phases, key=lambda name: self.phases[name])

    @property
    def allowance(self) -> int:
        """Bytes added for what is not derived: a fixed part, and fragmentation."""
        return FIXED_ALLOWANCE + round(FRAGMENTATION * self.phases[self.phase])

    @property
    def peak(self) -> int:
        """Bytes at the peak of a step, allowance included."""
        return self.persistent + self.phases[self.phase] + self.allowance


def stage_memory(
    recipe: Recipe, model: Model, layout: Layout, assumptions: Assumptions, batches: MicroBatches
) -> list[StageMemory]:
    """Return the memory of a rank of every pipeline stage, first to last.

    Args:
        recipe: the recipe.
        model: the model's parameters.
        layout: the parallel sizes.
        assumptions: what stands for the data.
        batches: the micro-batches of an optimizer step.
    """
    return [_stage(recipe, model, layout, assumptions, batches, stage) for stage in range(layout.pipeline)]


def element_bytes(recipe: Recipe) -> int:
    """Return the bytes of one element of a weight or an activation."""
    return DTYPES[recipe.policy.precision].itemsize


def data_parallelism(recipe: Recipe, layout: Layout) -> DataParallelism:
    """Return the data-parallel sizes and buffer options that the recipe sets."""
    options, nbytes = recipe.policy.megatron_cfg.distributed_data_parallel_config, element_bytes(recipe)
    return DataParallelism(
        size=recipe.data_parallel_size * layout.context,
        data=recipe.data_parallel_size,
        distributed_optimizer=options.use_distributed_optimizer,
        overlap_grad_reduce=options.overlap_grad_reduce,
        grad_bytes=FP32 if options.grad_reduce_in_fp32 else nbytes,
    )


def recompute_of(recipe: Recipe) -> Recompute:
    """Return what the recipe recomputes in the backward pass."""
    options = recipe.policy.megatron_cfg
    return Recompute(options.recompute_granularity, options.recompute_method, options.recompute_num_layers)


@dataclass(frozen=True)
class Kept:
    """Bytes that autograd keeps of one micro-batch, on one rank of a stage.

    Attributes:
        layers: bytes kept of the language layers.
        vision: bytes kept of the embedding, the merged features and the rank's share of the vision tower.
        output: bytes kept of the output layer.
    """

    layers: int
    vision: int
    output: int

    @property
    def total(self) -> int:
        """Bytes kept of the whole stage."""
        return self.layers + self.vision + self.output


def kept_of_row(recipe: Recipe, hf_config: Any, layout: Layout, row: Row, stage: int) -> Kept:
    """Return the bytes that autograd keeps of a packed row, on the rank of a stage that keeps the most.

    Args:
        recipe: the recipe, of which precision, recomputation and frozen parts are read.
        hf_config: transformers' configuration of the model.
        layout: the parallel sizes.
        row: the whole packed row.
        stage: number of the pipeline stage.
    """
    nbytes, text = element_bytes(recipe), hf_config.get_text_config()
    size, slots = activations.sizes(text, layout, row.tokens, nbytes), widest_slots(row, layout.context)
    layers = layout.stage_layers(text.num_hidden_layers)[stage]
    first, last = stage == 0, stage == layout.pipeline - 1
    return Kept(
        layers=activations.stage_layers(
            size, slots, recompute_of(recipe), layers, context_levels(hf_config, row, stage), first=first
        ),
        vision=_kept_of_images(recipe, hf_config, layout, row) if first else 0,
        output=activations.output_layer(size, _logit_chunks(recipe, layout, row)) if last else 0,
    )


def update_working(recipe: Recipe, hf_config: Any, layout: Layout, row: Row, stage: int) -> int:
    """Return an upper bound of the bytes that a forward or backward pass holds beside what autograd keeps.

    The arguments are those of ``kept_of_row``.
    """
    nbytes, text = element_bytes(recipe), hf_config.get_text_config()
    size, slots = activations.sizes(text, layout, row.tokens, nbytes), widest_slots(row, layout.context)
    layers = layout.stage_layers(text.num_hidden_layers)[stage]
    moments = [_layer_working(size, slots) + activations.recomputed(size, slots, recompute_of(recipe), layers)]
    if stage == layout.pipeline - 1:
        moments.append(_output_working(size, _logit_chunks(recipe, layout, row)))
    if stage == 0:
        moments.append(_vision_working(recipe, hf_config, layout, row))
    # The deepstack features travel through the first stage's forward pass, kept or not.
    return max(moments) + context_levels(hf_config, row, stage) * nbytes * size.shared * size.hidden


def _logit_chunks(recipe: Recipe, layout: Layout, row: Row) -> LogitChunks:
    # A context-parallel rank may hold the end of every sequence, where the responses are.
    labels = min(row.labels, row.tokens // layout.context)
    return LogitChunks.of(labels, recipe.policy.logprob_chunk_size)


def context_levels(hf_config: Any, row: Row, stage: int) -> int:
    """Return the number of deepstack levels that travel through a stage's layers."""
    return vision.geometry_of(hf_config).levels if stage == 0 and row.images else 0


def _stage(
    recipe: Recipe, model: Model, layout: Layout, assumptions: Assumptions, batches: MicroBatches, stage: int
) -> StageMemory:
    policy, text, nbytes = recipe.policy, model.config.get_text_config(), element_bytes(recipe)
    parameters = model.stage_parameters(layout, stage, freeze_vision=policy.megatron_cfg.freeze_vision)
    parallelism = data_parallelism(recipe, layout)
    state = model_state(parameters, parallelism, stage, nbytes=nbytes)
    first, last = stage == 0, stage == layout.pipeline - 1
    kept = kept_of_row(recipe, model.config, layout, batches.row, stage)
    size = activations.sizes(text, layout, batches.row.tokens, nbytes)
    engines = _engine(recipe, model, assumptions)
    return StageMemory(
        stage=stage,
        layers=layout.stage_layers(text.num_hidden_layers)[stage],
        state=state,
        engine_weights=engines.weights,
        in_flight=min(layout.pipeline - stage, batches.count),
        layer_activations=kept.layers,
        vision_activations=kept.vision,
        output_activations=kept.output,
        boundary=_boundary(nbytes * size.shared * size.hidden, recompute_of(recipe), nbytes, first=first, last=last),
        update_working=update_working(recipe, model.config, layout, batches.row, stage),
        optimizer_working=_optimizer_working(parameters, state, parallelism, layout),
        cache=engines.cache,
        generation_working=engines.working,
        # A parameter's shards, and the tensors that they are joined to.
        stream_working=engines.streamed + 2 * nbytes * max(tensor.numel() for tensor in model.tensors.values()),
    )


def _engine(recipe: Recipe, model: Model, assumptions: Assumptions) -> engine.EngineMemory:
    policy, nbytes = recipe.policy, element_bytes(recipe)
    generation = policy.generation
    if generation.backend == "vllm":
        return engine.vllm(policy, model.config, model.numel, nbytes, assumptions.gpu_memory)
    if generation.backend != "transformers":
        return engine.NONE
    samples = recipe.grpo.num_generations_per_prompt if isinstance(recipe, TrainRecipe) else 1
    prompt_tokens = policy.max_total_sequence_length - generation.max_new_tokens
    return engine.EngineMemory(
        weights=nbytes * model.numel,
        cache=engine.cache(model.config.get_text_config(), generation.batch_size, policy.max_total_sequence_length, nbytes),
        working=engine.working(
            model.config,
            -(-generation.batch_size // samples),
            prompt_tokens,
            min(assumptions.image_tokens, prompt_tokens),
            generation.batch_size,
            nbytes,
        ),
        streamed=0,
    )


def _boundary(hidden: int, recompute: Recompute, nbytes: int, *, first: bool, last: bool) -> int:
    """Return the bytes of hidden states that the schedule holds for a micro-batch's backward pass.

    It always holds the output. It holds the input where no layer keeps that very tensor (a checkpointed layer does, and
    so does a float32 norm).
    """
    received = 0 if first or recompute.granularity == "full" or nbytes == FP32 else hidden
    return received + (0 if last else hidden)


def _kept_of_images(recipe: Recipe, hf_config: Any, layout: Layout, row: Row) -> int:
    """Return the bytes that the first stage keeps before its layers.

    These are indices, merged features and the rank's share of the vision tower.
    """
    options, nbytes = recipe.policy.megatron_cfg, element_bytes(recipe)
    kept = activations.INT64 * (row.tokens // layout.context)
    if not row.images:
        return kept
    placeholders = row.placeholders // layout.context
    kept += activations.INT64 * placeholders  # where the embeddings are replaced
    if options.freeze_vision:
        return kept
    kept += vision.merge(vision.geometry_of(hf_config), placeholders, nbytes)
    recompute, patches = options.recompute_granularity == "full", _patches(hf_config, layout, row)
    return kept + vision.vision_of(hf_config).tower_bytes(hf_config, patches, nbytes, recompute=recompute)


def _patches(hf_config: Any, layout: Layout, row: Row) -> int:
    """Return the number of patches that the peer with the most encodes."""
    tokens = largest_share(row.images, layout.tensor * layout.context)
    return tokens * vision.geometry_of(hf_config).merge ** 2


def _layer_working(size: Sizes, slots: Slots) -> int:
    """Return the most bytes that a layer's backward pass holds (norm, MLP or attention), and a weight's gradient."""
    e, heads = size.nbytes, size.heads * size.head_dim
    norm = size.shared * size.hidden * (3 * FP32 if e == FP32 else 4 * FP32)
    mlp = 2 * e * size.tokens * size.features + e * size.shared * size.hidden
    attention = 12 * heads * max(size.tokens, slots.queries)
    return max(norm, mlp, attention) + 2 * e * size.features * size.hidden


def _output_working(size: Sizes, chunks: LogitChunks) -> int:
    """Return the bytes that ``linear_logprobs`` holds at most.

    They are a chunk's logits, in float32 and in the model's dtype, and the gradients of hidden states and weight.
    """
    e, copies = size.nbytes, 0 if size.nbytes == FP32 else 2
    logits = chunks.forward * size.columns
    forward = logits * ((0 if chunks.kept else FP32) + (e if copies else 0)) + min(TILE_BYTES, FP32 * logits)
    logits = chunks.backward * size.columns
    backward = logits * (FP32 + copies * e) + min(TILE_BYTES, FP32 * logits)
    backward += chunks.tokens * size.hidden * (FP32 + 2 * e) + e * size.tokens * size.hidden
    return max(forward, backward + e * size.columns * size.hidden)


def _vision_working(recipe: Recipe, hf_config: Any, layout: Layout, row: Row) -> int:
    """Return the most bytes that the vision tower holds, or the gathered features before tokens choose theirs."""
    if not row.images:
        return 0
    options, nbytes = recipe.policy.megatron_cfg, element_bytes(recipe)
    tower, peers, patches = hf_config.vision_config, layout.tensor * layout.context, _patches(hf_config, layout, row)
    moment = patches * max(6 * FP32 * tower.hidden_size, 3 * nbytes * tower.intermediate_size)
    if options.recompute_granularity == "full" and not options.freeze_vision:
        moment += vision.vision_of(hf_config).block_bytes(hf_config, patches, nbytes)
    geometry = vision.geometry_of(hf_config)
    return max(moment, vision.features(geometry, patches * peers // geometry.merge**2, nbytes))


def _optimizer_working(
    parameters: list[Parameter], state: ModelState, parallelism: DataParallelism, layout: Layout
) -> int:
    """Return the bytes that an optimizer step holds beside its state.

    Adam on lists of tensors makes a float32 tensor for each. Before it, gradients of the vision tower are averaged over
    tensor-parallel ranks, in one flat copy.
    """
    averaged = sum(p.numel for p in parameters if p.is_vision and p.trains) if layout.tensor > 1 else 0
    return max(FP32 * state.updated, parallelism.grad_bytes * averaged)
