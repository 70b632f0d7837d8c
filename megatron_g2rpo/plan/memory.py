# SPDX-License-Identifier: Apache-2.0
"""Memory of each pipeline stage's rank: what it holds throughout, what each phase of a step adds, and the peak."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_g2rpo.plan import engine, fp8
from megatron_g2rpo.plan.buffers import ModelState, model_state
from megatron_g2rpo.plan.kept import data_parallelism, element_bytes, kept_of_row, sizes_of
from megatron_g2rpo.plan.model import Model
from megatron_g2rpo.plan.rows import Assumptions, MicroBatches
from megatron_g2rpo.plan.sizes import Sizes
from megatron_g2rpo.plan.working import optimizer_working, update_working
from megatron_g2rpo.policy.layouts.layout import Layout
from megatron_g2rpo.recipe import Recipe, TrainRecipe

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
        engine_weights: bytes that the rollout engine holds throughout: its copy of the model, or what vLLM keeps
            asleep.
        in_flight: number of micro-batches whose activations are held at once.
        layer_activations: bytes that one micro-batch keeps of the language layers.
        vision_activations: bytes that one micro-batch keeps of the embedding and the vision tower.
        output_activations: bytes that one micro-batch keeps of the output layer.
        boundary: bytes of one micro-batch's input from the previous stage and output for the next stage.
        update_working: bytes that a forward or backward pass holds beside the kept activations, at most.
        optimizer_working: bytes that the optimizer step holds beside its state.
        cache: bytes of the key/value cache in generation; of vLLM that sleeps between generations, all that it takes
            awake.
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
        return self.state.held + self.engine_weights

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


def _stage(
    recipe: Recipe, model: Model, layout: Layout, assumptions: Assumptions, batches: MicroBatches, stage: int
) -> StageMemory:
    policy, text, nbytes = recipe.policy, model.config.get_text_config(), element_bytes(recipe)
    parameters = model.stage_parameters(layout, stage, freeze_vision=policy.megatron_cfg.freeze_vision)
    parallelism = data_parallelism(recipe, layout)
    size = sizes_of(recipe, model.config, layout, batches.row)
    megatron = policy.megatron_cfg
    state = model_state(
        parameters,
        parallelism,
        stage,
        nbytes=nbytes,
        fp8=fp8.weights(parameters, text.num_hidden_layers, megatron, size.modules),
    )
    last = stage == layout.pipeline - 1
    kept = kept_of_row(recipe, model.config, layout, batches.row, stage)
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
        boundary=_boundary(size, last=last),
        update_working=update_working(recipe, model.config, layout, batches.row, stage),
        optimizer_working=optimizer_working(parameters, state, parallelism, layout),
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
    batch = engine.Decoding.of(policy, samples, assumptions.image_tokens)
    return engine.EngineMemory(
        weights=nbytes * model.numel,
        cache=engine.cache(model.config.get_text_config(), batch, nbytes),
        working=engine.working(model.config, batch, nbytes),
        streamed=0,
    )


def _boundary(size: Sizes, *, last: bool) -> int:
    """Return the bytes of hidden states that the schedule holds for a micro-batch's backward pass.

    It holds the output; the input is kept by the first layer's norm, or by the checkpointed layer.
    """
    return 0 if last else size.nbytes * size.shared * size.hidden
