# SPDX-License-Identifier: Apache-2.0
"""From a recipe to the components of a loop: policy, engine, data and what lies between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_g2rpo import progress
from megatron_g2rpo.data import checks
from megatron_g2rpo.data.dataset import open_datasets
from megatron_g2rpo.data.errors import DataError, SampleError
from megatron_g2rpo.data.mixture import Mixture
from megatron_g2rpo.data.packing import Packer
from megatron_g2rpo.data.processing import ChatProcessor
from megatron_g2rpo.data.stream import PromptStream, number_tasks, validation_prompts
from megatron_g2rpo.models.vision_cache import VisionCache
from megatron_g2rpo.models.vision_graphs import VisionGraphs
from megatron_g2rpo.objective import History
from megatron_g2rpo.policy.device import Device, select, set_cpu_threads
from megatron_g2rpo.policy.layouts.layout import Layout, token_multiples
from megatron_g2rpo.policy.megatron import MegatronPolicy
from megatron_g2rpo.policy.reference_policy import ReferencePolicy
from megatron_g2rpo.recipe import Policy, Recipe, TrainRecipe
from megatron_g2rpo.recipe.policy_section import SequencePacking
from megatron_g2rpo.recipe.validation_metrics import unmeasured
from megatron_g2rpo.recipe.vision_graphs import why_no_graphs
from megatron_g2rpo.rollout import base as engines
from megatron_g2rpo.tasks import response_formats
from megatron_g2rpo.tasks.workers import RewardWorkers
from megatron_g2rpo.train.run.stopping import Stopping
from megatron_g2rpo.train.step.bad_updates import UpdateGuard
from megatron_g2rpo.types import DTYPES, Prompt


@dataclass(frozen=True)
class Components:
    """What a loop works with, on this rank.

    Attributes:
        device: the hardware of this rank.
        processor: turns chats into model inputs and responses into tokens.
        policy: the Megatron policy.
        packer: packs sequences into micro-batches.
        engine: turns prompts into rollouts.
        stream: the training prompts.
        validation: the held-out prompts that this rank answers; empty on every rank where ``data.validation`` is null.
        left_out: reason -> number of held-out samples, of all ranks, that cannot be used (``on_bad_sample: skip``).
        tasks: task names in the order of their ids, which is sorted.
        history: what the advantage estimator remembers of earlier steps.
        guard: decides which updates are taken.
        reference: the policy as it was before the run, where the loss or the reward measures the distance from it.
        workers: processes that reward parts run in; None: this process.
        stopping: whether the run is to stop before its last step.
    """

    device: Device
    processor: ChatProcessor
    policy: MegatronPolicy
    packer: Packer
    engine: engines.Engine
    stream: PromptStream
    validation: list[Prompt]
    left_out: Mapping[str, int]
    tasks: tuple[str, ...]
    history: History
    guard: UpdateGuard
    reference: ReferencePolicy | None
    workers: RewardWorkers | None
    stopping: Stopping

    def __enter__(self) -> Components:
        return self

    def __exit__(self, *error: object) -> None:
        """End the processes that belong to this one."""
        if self.workers is not None:
            self.workers.close()


def assemble(recipe: Recipe, build_engine: Callable[..., engines.Engine] | None = None) -> Components:
    """Build everything a loop needs. Cheap checks come first: data and layout errors appear before weights are read.

    Args:
        recipe: the run's recipe.
        build_engine: builds the engine, with the arguments of ``engine_for``; None: the one that the recipe names.

    Raises:
        DataError: the data cannot be used, see ``open_datasets`` and ``PromptStream``; or no held-out sample can, or
            none of the task by whose metric checkpoints are ranked.
        LayoutError: the model cannot be split as the recipe asks.
        CheckpointError: the weights of ``policy.model_name`` do not fit its config.
        ValueError: the engine cannot be built, see ``rollout.base``.
    """
    workers = RewardWorkers.of(recipe.env, recipe.imports)
    if workers is None:
        return _assembled(recipe, None, build_engine or engine_for)
    workers.start()  # while the weights are read
    try:
        return _assembled(recipe, workers, build_engine or engine_for)
    except BaseException:
        workers.close()  # else they say, after the error's own message, that their parent is gone
        raise


def _assembled(
    recipe: Recipe, workers: RewardWorkers | None, build_engine: Callable[..., engines.Engine]
) -> Components:
    loop = recipe.grpo if isinstance(recipe, TrainRecipe) else recipe.sft
    updates = recipe.num_updates_per_step if isinstance(recipe, TrainRecipe) else 1
    device = select(recipe.cluster.device)
    if device.kind == "cpu":
        set_cpu_threads(recipe.cluster.gpus_per_node)
    data = recipe.data
    processor = ChatProcessor(
        recipe.policy.model_name,
        data.min_pixels,
        data.max_pixels,
        data.system_prompt,
        response_formats.by_task(recipe.env, data.response_format) if data.format_instruction else None,
    )
    train_data = open_datasets(data.train, recipe.env)
    held_out = None if data.validation is None else open_datasets(data.validation, recipe.env)
    if held_out is not None:
        _check_ranking(recipe, held_out.tasks)
    task_ids = number_tasks(recipe.env.tasks)
    stream = PromptStream(
        train_data,
        data.task_weights,
        loop.seed,
        processor,
        data.on_bad_sample,
        checks=_training_checks(recipe, processor),
        task_ids=task_ids,
    )
    progress.enter("weights")
    # What no engine samples has no probability in the policy either: both then speak of one distribution.
    banned = processor.banned_token_ids(processor.vocab_size)
    cache = vision_cache_of(recipe)
    policy = MegatronPolicy(
        recipe.policy,
        device,
        seed=loop.seed,
        max_steps=loop.max_num_steps * updates,
        banned_token_ids=banned,
        vision_cache=cache,
    )
    progress.enter("data")
    validation, left_out = _validation(recipe, held_out, processor, task_ids)
    progress.enter("engine")
    stopping = Stopping(recipe.checkpointing.checkpoint_must_save_by)
    return Components(
        device=device,
        processor=processor,
        policy=policy,
        packer=packer_for(processor, policy.layout, recipe.policy.sequence_packing),
        engine=build_engine(recipe.policy, processor, device, banned, lambda: stopping.asked() is not None, cache),
        stream=stream,
        validation=validation,
        left_out=left_out,
        tasks=tuple(task_ids),
        history=History(),
        guard=UpdateGuard(recipe.policy.megatron_cfg.optimizer, Path(recipe.logger.log_dir) / "skipped"),
        # Now, before the run's newest checkpoint is read.
        reference=ReferencePolicy(policy) if _needs_reference(recipe) else None,
        workers=workers,
        stopping=stopping,
    )


def _training_checks(recipe: Recipe, processor: ChatProcessor) -> list[checks.Check]:
    if isinstance(recipe, TrainRecipe):
        return _answered_checks(recipe)
    return [checks.response_fits(processor, recipe.policy.max_total_sequence_length)]


def _answered_checks(recipe: Recipe) -> list[checks.Check]:
    """What a prompt that the policy answers must hold."""
    readable = checks.reference_is_readable(checks.scored_formats(recipe.env))
    return [checks.prompt_fits(recipe.policy), readable]


def _validation(
    recipe: Recipe, held_out: Mixture | None, processor: ChatProcessor, task_ids: Mapping[str, int]
) -> tuple[list[Prompt], Mapping[str, int]]:
    """This rank's held-out prompts, and how many samples of all ranks are left out, by reason. A collective."""
    if held_out is None:
        return [], {}
    loop = recipe.grpo if isinstance(recipe, TrainRecipe) else recipe.sft
    errors: list[SampleError] = []
    prompts = validation_prompts(
        held_out,
        loop.max_val_samples,
        processor,
        recipe.data.on_bad_sample,
        rows=slice(torch.distributed.get_rank(), None, torch.distributed.get_world_size()),
        task_ids=task_ids,
        checks=_answered_checks(recipe),
        on_skipped=errors.append,
    )
    usable = torch.tensor([len(prompts)])
    torch.distributed.all_reduce(usable)
    mine = (
        Counter(error.reason for error in errors),
        str(errors[0]) if errors else None,
        {prompt.task for prompt in prompts},
    )
    everyone = [mine] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, mine)
    if usable == 0:
        first = next((message for _, message, _ in everyone if message is not None), "there is none")
        raise DataError(f"data.validation: no held-out sample can be used; the first: {first}")
    _check_ranking(recipe, set[str]().union(*(tasks for _, _, tasks in everyone)))
    return prompts, sum((reasons for reasons, _, _ in everyone), Counter())


def _check_ranking(recipe: Recipe, tasks: Collection[str]) -> None:
    """Check, before any step, that validation data of these tasks gives the metric that checkpoints are ranked by."""
    why = unmeasured(recipe.checkpointing.metric_name, tasks)
    if why is not None:
        raise DataError(why)


def _needs_reference(recipe: Recipe) -> bool:
    return isinstance(recipe, TrainRecipe) and recipe.loss_fn.reference_policy_kl.penalty > 0.0


def packer_for(processor: ChatProcessor, layout: Layout, packing: SequencePacking) -> Packer:
    """Build a packer with the processor's tokens, whose micro-batches the layout can split.

    Args:
        processor: whose tokens and positions the model knows.
        layout: the parallel sizes.
        packing: the recipe's ``policy.sequence_packing``.
    """
    sequence_multiple, row_multiple = token_multiples(layout)
    return Packer(
        image_token_id=processor.image_token_id,
        spatial_merge_size=processor.spatial_merge_size,
        pad_token_id=processor.pad_token_id,
        sequence_multiple=sequence_multiple,
        row_multiple=row_multiple,
        positions=processor.family.positions,
        shared_prefix=packing.shared_prefix,
    )


def vision_cache_of(recipe: Recipe) -> VisionCache | None:
    """Return the cache of image features that policy and engine of this process share; None where it is off."""
    policy = recipe.policy
    graphs = VisionGraphs(policy.vision_graph_mb * 10**6) if why_no_graphs(recipe) is None else None
    if not policy.vision_cache_mb:
        return None
    return VisionCache(policy.vision_cache_mb * 10**6, frozen=policy.megatron_cfg.freeze_vision, graphs=graphs)


def engine_for(
    policy: Policy,
    processor: ChatProcessor,
    device: Device,
    banned_token_ids: Sequence[int],
    is_asked_to_stop: Callable[[], bool] = lambda: False,
    vision_cache: VisionCache | None = None,
) -> engines.Engine:
    """Build the rollout engine that the recipe names, without weights. A collective of all ranks.

    Args:
        policy: the recipe's section.
        processor: decodes tokens, and knows which of them are special.
        device: this rank's device.
        banned_token_ids: tokens that are never sampled.
        is_asked_to_stop: whether this rank is; see ``engines.Context``.
        vision_cache: that of the policy which gives the engine its weights; None: the engine has none.
    """
    context = engines.Context(
        policy=policy,
        device=device.torch_device,
        dtype=DTYPES[policy.precision],
        nccl=device.nccl,
        eos_token_ids=processor.eos_token_ids,
        pad_token_id=processor.pad_token_id,
        banned_token_ids=banned_token_ids,
        image_token_id=processor.image_token_id,
        spatial_merge_size=processor.spatial_merge_size,
        decode=processor.decode,
        is_asked_to_stop=is_asked_to_stop,
        vision_cache=vision_cache,
    )
    return engines.get(policy.generation.backend).build(context, **policy.generation.backend_cfg)
