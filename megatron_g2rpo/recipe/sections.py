# SPDX-License-Identifier: Apache-2.0
"""The sections beside ``policy``: grpo, sft, loss_fn, checkpointing, data, env, logger and cluster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from megatron_g2rpo.recipe.base import Section, ascending, conflict

Text = Annotated[str, Field(min_length=1)]


class AdvEstimator(Section):
    """``grpo.adv_estimator``: from rewards to advantages."""

    name: Text
    """Name in the registry of advantage estimators (``objective.estimators``)."""
    stages: Annotated[tuple[Literal["group", "task"], ...], Field(strict=False)]
    """Scopes that the rewards are mapped to N(0, 1) in, one after the other."""
    tie_tolerance: NonNegativeFloat
    """Rewards closer than this are equal."""
    zero_variance: Literal["drop", "keep"]
    """Groups whose rewards are all equal: advantage 0 and no rank in the task, or ranked like the rest."""
    variance: Literal["as_is", "unit"]
    """Keep the variance of the midpoint quantiles, or rescale every task to 1."""
    ema_decay: Annotated[float, Field(ge=0.0, lt=1.0)]
    """``ema_grpo``: what a task's moving averages keep from step to step."""
    min_std: PositiveFloat
    """``ema_grpo``: least standard deviation that is divided by."""
    baseline: Literal["batch", "group"]
    """``reinforce_plus_plus``: what is subtracted from a reward."""

    @model_validator(mode="after")
    def _order(self) -> AdvEstimator:
        if self.stages not in {("group",), ("task",), ("group", "task")}:
            raise conflict(f"stages must be [group], [task] or [group, task], got {list(self.stages)}", "stages")
        return self


class _Loop(Section):
    max_num_steps: PositiveInt
    """Steps of the run."""
    val_period: NonNegativeInt
    """Steps between validations; 0: none in between."""
    val_at_start: bool
    """Validate before the first step."""
    val_at_end: bool
    """Validate after the last step."""
    max_val_samples: PositiveInt
    """Validation prompts per task."""
    seed: NonNegativeInt
    """Seed of everything that is drawn: initial weights, order of prompts, sampling."""


class OverlongPenalty(Section):
    """``grpo.overlong_penalty``: of ``grpo.overlong: penalise``."""

    buffer: PositiveInt
    """Response tokens before ``policy.generation.max_new_tokens`` over which the penalty grows from 0 to all of it."""
    weight: PositiveFloat
    """What is taken from the reward at ``max_new_tokens``."""


class DynamicSampling(Section):
    """``grpo.dynamic_sampling``: groups without signal are replaced by new prompts."""

    enabled: bool
    """Replace them; false: they are trained on as they are (see ``grpo.adv_estimator.zero_variance``)."""
    filter_low: Annotated[float, Field(ge=0.0, lt=1.0)] | None
    """A group whose mean accuracy is not above this is dropped; null: no bound."""
    filter_high: Annotated[float, Field(gt=0.0, le=1.0)] | None
    """A group whose mean accuracy is not below this is dropped; null: no bound."""
    max_rounds: PositiveInt
    """Rounds of generation in a step. What they leave unfilled keeps its dropped groups."""
    oversampling: Annotated[float, Field(ge=1.0)]
    """Prompts drawn in a round per prompt that is missing."""

    @model_validator(mode="after")
    def _order(self) -> DynamicSampling:
        if self.filter_low is not None and self.filter_high is not None and self.filter_low >= self.filter_high:
            raise conflict(
                f"no mean accuracy lies between {self.filter_low} and {self.filter_high}", "filter_low", "filter_high"
            )
        return self


class Grpo(_Loop):
    """``grpo``: the reinforcement-learning loop."""

    num_prompts_per_step: PositiveInt
    """Prompts per step, over all ranks."""
    num_generations_per_prompt: PositiveInt
    """Responses sampled per prompt: the size of a group."""
    overlong: Literal["keep", "mask", "penalise"]
    """Truncated responses: trained on, rewarded but masked out of the loss, or trained on with a lower reward."""
    overlong_penalty: OverlongPenalty
    """How much lower."""
    dynamic_sampling: DynamicSampling
    """Replacement of groups without signal."""
    task_gradient_period: NonNegativeInt
    """Steps between measurements of each task's share of the gradient, a backward pass a task; 0: never."""
    adv_estimator: AdvEstimator
    """From rewards to advantages."""

    @model_validator(mode="after")
    def _group_size(self) -> Grpo:
        if "group" in self.adv_estimator.stages and self.num_generations_per_prompt == 1:
            raise conflict(
                "a group of 1 has no advantage: set num_generations_per_prompt to 2 or more, or stages to [task]",
                "num_generations_per_prompt",
                "adv_estimator.stages",
            )
        return self


class Sft(_Loop):
    """``sft``: the supervised loop. The batch size is ``policy.train_global_batch_size``."""


class EntropyShaping(Section):
    """``loss_fn.entropy_shaping``: keeps each task's entropy within its bounds (``env.tasks.<task>.entropy``)."""

    enabled: bool
    """Add the term to the loss."""
    weight: NonNegativeFloat
    """Weight of the sum over tasks, loss per nat."""
    sides: Literal["fresh", "sampled"]
    """Which entropies say on what side of its bounds a task is: those of the weights that an update starts from (a
    forward pass more for every update of a step but the first), or of the weights that sampled the step."""


class ReferencePolicyKl(Section):
    """``loss_fn.reference_policy_kl``: the KL divergence from the policy that the run started with."""

    penalty: NonNegativeFloat
    """Its weight; 0: off, and no reference policy is kept."""
    kind: Literal["k1", "k2", "k3"]
    """Schulman's estimators, see ``objective.kl``."""
    where: Literal["loss", "reward"]
    """A term of the loss with gradient, or taken from the reward before advantages are computed."""

    @model_validator(mode="after")
    def _gradient(self) -> ReferencePolicyKl:
        if self.penalty > 0.0 and self.kind == "k1" and self.where == "loss":
            raise conflict("the gradient of k1 in the loss has expectation 0; take k2 or k3", "kind", "where")
        return self


class ImportanceSampling(Section):
    """``loss_fn.importance_sampling``: where the rollout engine and the trainer disagree about the same tokens."""

    truncated_ratio: Annotated[float, Field(ge=1.0)] | None
    """A token's loss is weighted by trainer / engine probability, at most this; null: by 1."""
    sequence_ratio_min: Annotated[float, Field(gt=0.0, le=1.0)] | None
    """Sequences whose geometric-mean ratio lies below are masked out of the surrogate's loss; null: none."""
    sequence_ratio_max: Annotated[float, Field(ge=1.0)] | None
    """Sequences whose geometric-mean ratio lies above are masked out of the surrogate's loss; null: none."""


class LossFn(Section):
    """``loss_fn``: the surrogate, and the terms beside it."""

    name: Text
    """Name in the registry of surrogates: ``ppo``, ``gspo``, ``cispo`` or ``sapo``."""
    ratio_clip_min: Annotated[float, Field(gt=0.0, lt=1.0)]
    """The ratio is clipped below at 1 minus this."""
    ratio_clip_max: PositiveFloat
    """The ratio is clipped above at 1 plus this."""
    ratio_clip_c: Annotated[float, Field(gt=1.0)] | None
    """Dual clip: for a negative advantage the loss is at most this times its size; null: off."""
    token_level_loss: bool
    """Mean over all response tokens of the batch; false: over sequences of each one's token mean."""
    log_ratio_clamp: PositiveFloat
    """The log-ratio is clamped to plus or minus this before it is exponentiated, nats."""
    sapo_tau_positive: PositiveFloat
    """``sapo``: temperature of the gate at positive advantages."""
    sapo_tau_negative: PositiveFloat
    """``sapo``: temperature of the gate at the others."""
    reference_policy_kl: ReferencePolicyKl
    """Divergence from the initial policy."""
    importance_sampling: ImportanceSampling
    """Correction of the gap between the rollout engine's and the trainer's log-probabilities."""
    entropy_shaping: EntropyShaping
    """The entropy term."""


class Checkpointing(Section):
    """``checkpointing``: what is written to disk."""

    enabled: bool
    """Save checkpoints that the run can resume from."""
    checkpoint_dir: Text
    """Folder of the checkpoints."""
    save_period: PositiveInt
    """Steps between checkpoints; the last step is always saved."""
    keep_latest_k: PositiveInt | None
    """Checkpoints kept; null: all."""
    export_hf: bool
    """Write the final policy as a Hugging Face directory, ``<logger.log_dir>/hf``."""


class DataSource(Section):
    """``data.train`` and ``data.validation``."""

    path: Text
    """Folder or glob of webdataset ``.tar`` shards."""


class Data(Section):
    """``data``: the prompts."""

    train: DataSource
    """Shards to train on."""
    validation: DataSource
    """Held-out shards."""
    on_bad_sample: Literal["error", "skip"]
    """A sample that cannot be decoded: stop and name it, or count it and go on."""
    min_pixels: PositiveInt | None
    """Smaller images are scaled up to this area, pixels; null: the image processor's own."""
    max_pixels: PositiveInt | None
    """Larger images are scaled down to this area, pixels; null: the image processor's own."""
    system_prompt: str | None
    """System message before every question; null: none."""
    task_weights: Mapping[str, NonNegativeFloat]
    """Task -> relative share of the prompts; a task that is not listed has 1; {}: all equal."""

    @model_validator(mode="after")
    def _pixels(self) -> Data:
        if self.min_pixels is not None and self.max_pixels is not None:
            ascending(self, ["min_pixels", "max_pixels"])
        return self


class Trapezoid(Section):
    """``env.tasks.<task>.length``: 0 up to ``start``, 1 from ``peak_start`` to ``peak_end``, 0 from ``end``; tokens."""

    start: NonNegativeInt
    """Response tokens up to which the reward is 0."""
    peak_start: NonNegativeInt
    """Response tokens from which the reward is 1."""
    peak_end: NonNegativeInt
    """Response tokens up to which the reward is 1."""
    end: NonNegativeInt
    """Response tokens from which the reward is 0."""

    @model_validator(mode="after")
    def _order(self) -> Trapezoid:
        ascending(self, ["start", "peak_start", "peak_end", "end"])
        return self


class EntropyBounds(Section):
    """``env.tasks.<task>.entropy``: bounds that the task's mean token entropy is kept in."""

    low: NonNegativeFloat
    """Nats below which the loss pulls the entropy up."""
    high: NonNegativeFloat
    """Nats above which the loss pulls the entropy down."""

    @model_validator(mode="after")
    def _order(self) -> EntropyBounds:
        ascending(self, ["low", "high"])
        return self


class Task(Section):
    """``env.tasks.<task>``: how one task is rewarded and shaped."""

    answer_format: Text | None
    """Accuracy reward for every sample of the task; null: the one that each sample names."""
    length: Trapezoid | None
    """Length reward; null: none."""
    entropy: EntropyBounds | None
    """Entropy bounds; null: not shaped."""


class RewardWeights(Section):
    """``env.reward_weights``: weights of the reward's parts, each of which lies in [0, 1]."""

    accuracy: NonNegativeFloat
    """Weight of the answer's accuracy."""
    format: NonNegativeFloat
    """Weight of ``<thinking>...</thinking><answer>...</answer>``."""
    structure: NonNegativeFloat
    """Weight of the structure bonus inside the answer."""
    length: NonNegativeFloat
    """Weight of the length reward."""


class Env(Section):
    """``env``: the rewards."""

    reward_weights: RewardWeights
    """How the parts are combined, once."""
    tasks: Annotated[Mapping[str, Task], Field(min_length=1)]
    """Every task that occurs in the data."""


class Logger(Section):
    """``logger``: the run directory."""

    log_dir: Text
    """The run directory: metrics.jsonl, recipe.yaml, tensorboard/, checkpoints/, hf/."""
    tensorboard_enabled: bool
    """Write TensorBoard events as well."""
    num_val_samples_to_print: NonNegativeInt
    """Validation responses printed at each validation."""


class Cluster(Section):
    """``cluster``: the processes."""

    num_nodes: PositiveInt
    """Machines."""
    gpus_per_node: PositiveInt
    """Processes per machine: one per GPU, or on CPUs as many as wanted."""
    device: Literal["auto", "cpu", "gpu"]
    """Hardware to run on; auto: GPUs where there are any."""
