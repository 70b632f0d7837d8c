# SPDX-License-Identifier: Apache-2.0
"""Time of a step and tokens a second of a GPU: an estimate from operations, bytes and a card's data sheet.

Nothing of it is measured here. Left out are the scoring of responses, validation, checkpoints, data, and what dynamic
sampling samples anew. ``EFFICIENCY`` and the constants of ``plan.decoding`` and ``plan.links`` are all that is assumed;
docs/plan.md holds the result against published steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_g2rpo.models.cards import NETWORK, Card
from megatron_g2rpo.plan import decoding, flops, links
from megatron_g2rpo.plan.decoding import BANDWIDTH, Engine, Responses
from megatron_g2rpo.plan.flops import Flops, Shape
from megatron_g2rpo.plan.kept import element_bytes
from megatron_g2rpo.plan.planner import Plan
from megatron_g2rpo.plan.sizes import modules_of
from megatron_g2rpo.plan.wire import OPTIMIZER_STEP, ROLLOUT_STEP
from megatron_g2rpo.recipe import TrainRecipe

# Share of a card's peak that training's matrix products reach, by their arithmetic, norms and activations included.
EFFICIENCY = {"bf16": 0.40, "fp8": 0.30, "fp32": 0.60}


@dataclass(frozen=True, kw_only=True)
class Speed:
    """The time of a step, seconds by phase, and what it comes to.

    Attributes:
        generation: sampling the responses.
        weights: the new weights on their way to the engines.
        logprobs: passes without gradient: of the policy before the update, and of the reference policy.
        update: forward and backward passes of all optimizer steps, idle time of the pipeline included.
        optimizer: the optimizer steps themselves.
        messages: what collectives add to the passes.
        tokens: tokens of a step's sequences, prompts and responses, over all ranks.
        gpus: GPUs of trainer and servers together.
        model_flops: operations of the update's forward and backward passes, over all ranks, without recomputation.
        peak: bfloat16 operations a second of the trainer's GPUs together.
    """

    generation: float
    weights: float
    logprobs: float
    update: float
    optimizer: float
    messages: float
    tokens: float
    gpus: int
    model_flops: float
    peak: float

    @property
    def phases(self) -> dict[str, float]:
        """Seconds of each phase, by name, in their order."""
        names = ("generation", "weights", "logprobs", "update", "messages", "optimizer")
        return {name: getattr(self, name) for name in names}

    @property
    def step(self) -> float:
        """Seconds of a step: phases follow each other."""
        return sum(self.phases.values())

    @property
    def rate(self) -> float:
        """Tokens a second of a GPU, prompts and responses, over the whole step."""
        return self.tokens / self.step / self.gpus

    @property
    def mfu(self) -> float:
        """Share of the trainer's bfloat16 peak that the update uses for the model (recomputation does not count)."""
        return self.model_flops / (self.update + self.messages + self.optimizer) / self.peak


def passes(part: Flops, card: Card, *, arithmetic: str) -> float:
    """Return the seconds that one GPU computes; in ``fp8`` the rest beside the linears is bfloat16.

    Raises:
        ValueError: the card has no FP8.
    """
    if arithmetic == "fp8" and card.fp8 is None:
        raise ValueError("policy.megatron_cfg.fp8_cfg.enabled: the card (--card) has no FP8")
    peaks = {"bf16": card.bf16, "fp8": card.fp8 or 0.0, "fp32": card.fp32}
    rest = "bf16" if arithmetic == "fp8" else arithmetic
    others = part.attention + part.logits + part.vision
    return part.linear / (EFFICIENCY[arithmetic] * peaks[arithmetic]) + others / (EFFICIENCY[rest] * peaks[rest])


def estimate(plan: Plan, card: Card) -> Speed:
    """Estimate the time of a step of a plan's recipe.

    Raises:
        ValueError: the recipe asks for FP8 and the card has none.
    """
    recipe, updates = plan.recipe, plan.updates
    shape = flops.shape_of(plan.model)
    rollouts = isinstance(recipe, TrainRecipe)
    whole = forward_flops(plan)
    sent = [
        updates * links.seconds(recipe, plan.layout, [t for t in lines if t.per == OPTIMIZER_STEP], card)
        for lines in plan.traffic
    ]
    state = plan.worst.state
    # Moments, master copies and weights are read and written, gradients read.
    moved = 2 * state.optimizer + 2 * state.weights + state.gradients
    samples = recipe.policy.train_global_batch_size * updates
    return Speed(
        generation=_generation(plan, recipe, shape, card) if rollouts else 0.0,
        weights=_weights(plan, card) if rollouts else 0.0,
        logprobs=plan.passes * _bottleneck(plan, whole, card, _FORWARD),
        update=updates * _bottleneck(plan, whole, card, _update_factors(plan)),
        optimizer=updates * moved / (BANDWIDTH * card.bandwidth),
        messages=max(sent),
        tokens=samples * plan.assumptions.sequence_tokens,
        gpus=recipe.world_size + _server_gpus(plan),
        model_flops=3 * updates * recipe.data_parallel_size * whole.total,
        peak=recipe.world_size * card.bf16,
    )


@dataclass(frozen=True, kw_only=True)
class _Factors:
    """How many forward passes' worth of operations each part takes."""

    linear: float = 1.0
    attention: float = 1.0
    logits: float = 1.0
    vision: float = 1.0


_FORWARD = _Factors()


def _update_factors(plan: Plan) -> _Factors:
    """A backward pass has twice the operations of a forward pass; what is recomputed has one forward pass more."""
    options = plan.recipe.policy.megatron_cfg
    full, selective = (options.recompute_granularity == kind for kind in ("full", "selective"))
    layers = plan.model.config.get_text_config().num_hidden_layers
    share = 1.0 if options.recompute_method == "uniform" else min(1.0, options.recompute_num_layers / layers)
    return _Factors(
        linear=3 + full * share,
        attention=3 + full * share + selective,
        logits=3.125,  # seven of eight chunks' logits are kept, at most
        vision=1.0 if options.freeze_vision else 3.0 + full,
    )


def forward_flops(plan: Plan) -> Flops:
    """Return the operations of a forward pass over a data-parallel rank's rows of one optimizer step."""
    assumed = plan.assumptions
    return flops.forward(
        flops.shape_of(plan.model),
        tokens=plan.batches.computed,
        pairs=plan.batches.pairs,
        labels=plan.batches.sequences * assumed.response_tokens,
        images=plan.batches.images,
        image_tokens=assumed.image_tokens,
    )


def _bottleneck(plan: Plan, whole: Flops, card: Card, factors: _Factors) -> float:
    """Return the seconds of a data-parallel rank's passes, on the stage that computes longest.

    Stages share the layers; images are the first stage's and logits the last's.
    """
    layout, fp8 = plan.layout, modules_of(plan.recipe, plan.model.config).fp8
    arithmetic = "fp32" if element_bytes(plan.recipe) == 4 else "bf16" if fp8 is None else "fp8"
    counts = layout.stage_layers(plan.model.config.get_text_config().num_hidden_layers)
    peers, last = layout.tensor * layout.context, layout.pipeline - 1
    times = []
    for stage, count in enumerate(counts):
        share = count / sum(counts)
        part = Flops(
            linear=factors.linear * whole.linear * share / peers,
            attention=factors.attention * whole.attention * share / peers,
            logits=factors.logits * whole.logits / peers if stage == last else 0.0,
            vision=factors.vision * whole.vision / peers if stage == 0 else 0.0,
        )
        times.append(passes(part, card, arithmetic=arithmetic))
    return max(times) / (1 - plan.bubble)


def _server_gpus(plan: Plan) -> int:
    generation = plan.recipe.policy.generation
    if not isinstance(plan.recipe, TrainRecipe) or generation.backend != "vllm_server":
        return 0
    return len(generation.vllm_server_cfg.addresses) * generation.vllm_cfg.tensor_parallel_size


def _generation(plan: Plan, recipe: TrainRecipe, shape: Shape, card: Card) -> float:
    generation, assumed = recipe.policy.generation, plan.assumptions
    vllm, nbytes = generation.vllm_cfg, element_bytes(recipe)
    serving = generation.backend != "transformers"
    ranks = vllm.tensor_parallel_size if serving else 1
    engines = (_server_gpus(plan) or recipe.world_size) // ranks
    engine = Engine(
        ranks=ranks,
        batch=generation.batch_size,
        serving=serving,
        weight_bytes=nbytes,
        cache_bytes=nbytes,
        memory=ranks * vllm.gpu_memory_utilization * assumed.gpu_memory if serving else float("inf"),
    )
    responses = Responses(
        prompts=recipe.grpo.num_prompts_per_step / engines,
        samples=recipe.grpo.num_generations_per_prompt,
        prompt_tokens=assumed.sequence_tokens - assumed.response_tokens,
        image_tokens=assumed.image_tokens,
        mean=assumed.response_tokens,
        longest=max(generation.max_new_tokens, assumed.response_tokens),
    )
    return decoding.seconds(shape, engine, responses, card)


def _weights(plan: Plan, card: Card) -> float:
    """Return the seconds of the weights' way to the engines: the gathers, and to servers one broadcast of all."""
    lines = [line for line in plan.traffic[0] if line.per == ROLLOUT_STEP]
    gathers = links.seconds(plan.recipe, plan.layout, lines, card)
    if not _server_gpus(plan):
        return gathers
    return gathers + element_bytes(plan.recipe) * plan.model.numel / (links.REACHED * NETWORK)
