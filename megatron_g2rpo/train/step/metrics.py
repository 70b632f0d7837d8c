# SPDX-License-Identifier: Apache-2.0
"""The numbers of a G2RPO step: rewards per part and task, the objective's health, the rollout gap."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_g2rpo.objective import AdvantageDiagnostics, GroupStatistics, importance
from megatron_g2rpo.recipe import Env, TrainRecipe
from megatron_g2rpo.tasks.scoring import read
from megatron_g2rpo.train.assembly import Components
from megatron_g2rpo.train.step.losses import G2RPOLoss, TaskEntropies
from megatron_g2rpo.types import PackedBatch, Rewards, Rollout

# Share of responses with an answer below which there is hardly a reward to learn from.
FEW_ANSWERS = 0.05
SHOWN_CHARACTERS = 600  # of a response without


def skipped_metrics(parts: Components, before: int) -> dict[str, float]:
    """``train/skipped_samples``: bad samples that the step replaced (``data.on_bad_sample: skip``). A collective.

    Args:
        before: ``parts.stream.num_skipped`` at the start of the step.
    """
    skipped = torch.tensor([parts.stream.num_skipped - before])
    dist.all_reduce(skipped, group=parts.policy.groups.data)
    return {"train/skipped_samples": float(skipped)}


def rollout_metrics(parts: Components, rollouts: Sequence[Rollout], rewards: Rewards) -> dict[str, float]:
    """Means over the global batch, overall and per task, such as ``train/<task>/accuracy``. A collective."""
    columns = {
        "reward": rewards.total,
        **rewards.parts,
        "response_tokens": torch.tensor([len(r.response_ids) for r in rollouts], dtype=torch.float64),
        "truncated": torch.tensor([r.truncated for r in rollouts], dtype=torch.float64),
    }
    tasks = torch.tensor([parts.task_id(r.prompt.task) for r in rollouts], dtype=torch.int64)
    counts, means = _means_by_task(parts, tasks, columns)
    metrics = {f"train/{name}": float((means[name] * counts).nansum() / counts.sum()) for name in columns}
    return {**metrics, **_by_task(parts, means)}


def length_metrics(recipe: TrainRecipe, parts: Components, rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Share of a task's responses that are shorter or longer than the plateau of its length reward. A collective.

    ``train/<task>/length_below`` and ``.../length_above``; nothing for tasks without length reward.
    """
    bounds = {task: settings.length for task, settings in recipe.env.tasks.items() if settings.length is not None}
    shaped = [rollout for rollout in rollouts if rollout.prompt.task in bounds]
    lengths = [(len(rollout.response_ids), bounds[rollout.prompt.task]) for rollout in shaped]
    columns = {
        "length_below": torch.tensor([length < corner.peak_start for length, corner in lengths], dtype=torch.float64),
        "length_above": torch.tensor([length > corner.peak_end for length, corner in lengths], dtype=torch.float64),
    }
    tasks = torch.tensor([parts.task_id(rollout.prompt.task) for rollout in shaped], dtype=torch.int64)
    return _by_task(parts, _means_by_task(parts, tasks, columns)[1])


def group_metrics(parts: Components, rollouts: Sequence[Rollout], statistics: GroupStatistics) -> dict[str, float]:
    """``train/zero_variance_groups``, the share of groups without signal, and of each task's. A collective."""
    without = dict(zip(statistics.groups.id.tolist(), statistics.groups.zero_variance.tolist(), strict=True))
    # A group lies on one data-parallel rank: its first response stands for it.
    groups = [rollout for rollout in rollouts if rollout.sample_index == 0]
    column = torch.tensor([without[rollout.group_id] for rollout in groups], dtype=torch.float64)
    tasks = torch.tensor([parts.task_id(rollout.prompt.task) for rollout in groups], dtype=torch.int64)
    _, means = _means_by_task(parts, tasks, {"zero_variance_groups": column})
    overall = float(statistics.groups.zero_variance.double().mean())
    return {"train/zero_variance_groups": overall, **_by_task(parts, means)}


def advantage_metrics(parts: Components, diagnostics: AdvantageDiagnostics) -> dict[str, float]:
    """How a task's advantages are distributed: ``train/<task>/advantage_{mean,std,skew,q05,q50,q95}``.

    ``.../advantage_normal_distance`` is their 1-Wasserstein distance from N(0, 1).
    """
    names = ("mean", "std", "skew", "q05", "q50", "q95", "normal_distance")
    return {
        f"train/{parts.tasks[task]}/advantage_{name}": float(getattr(diagnostics, name)[row])
        for row, task in enumerate(diagnostics.task.tolist())
        for name in names
    }


def task_gradient_metrics(
    parts: Components, rows: Sequence[PackedBatch], loss: G2RPOLoss, entropies: TaskEntropies, temperature: float
) -> dict[str, float]:
    """Norm of the gradient that each task contributes to an update, by a backward pass each. A collective.

    ``train/<task>/gradient_norm``, and ``.../gradient_share``, its share of the sum of the tasks' norms.
    """
    norms = {
        task: parts.policy.gradient_norm(rows, loss.of_task(index), temperature)["grad_norm"]
        for index, task in enumerate(parts.tasks)
        if entropies.counts[index] > 0
    }
    total = sum(norms.values())
    return {
        **{f"train/{task}/gradient_norm": norm for task, norm in norms.items()},
        **({f"train/{task}/gradient_share": norm / total for task, norm in norms.items()} if total > 0 else {}),
    }


def entropy_metrics(parts: Components, entropies: TaskEntropies, loss: G2RPOLoss) -> dict[str, float]:
    """Mean entropy of each task before the update, in nats; its side of its bounds; the value of the entropy term."""
    metrics = {"train/entropy_loss": loss.hinge}
    sides = loss.sides.tolist()
    for task, mean, count, side in zip(parts.tasks, entropies.mean, entropies.counts, sides, strict=True):
        if count > 0:
            metrics[f"train/{task}/entropy"] = float(mean)
            metrics[f"train/{task}/entropy_side"] = float(side)
    return metrics


def gap_metrics(parts: Components, batches: Sequence[PackedBatch]) -> dict[str, float]:
    """How far the rollout engine's log-probabilities are from the trainer's, over response tokens. A collective.

    ``train/rollout_gap_mean``, ``..._max`` and ``..._kl``: mean and largest absolute difference, and KL(engine ||
    trainer), in nats; the same for every task.
    """
    count = len(parts.tasks)
    zeros = torch.zeros(count, dtype=torch.float64)
    total = importance.GapSums(count=zeros, absolute=zeros, kl=zeros, largest=zeros)
    for batch in batches:
        assert batch.old_logprobs is not None
        response = batch.task_ids >= 0
        total = total.merge(
            importance.gap_sums(batch.old_logprobs, batch.behaviour_logprobs, batch.task_ids, response, count)
        )
    sums, largest = torch.stack([total.count, total.absolute, total.kl]), total.largest.clone()
    dist.all_reduce(sums, group=parts.policy.groups.data)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=parts.policy.groups.data)
    tokens, absolute, divergence = sums
    everywhere = tokens.sum().clamp(min=1.0)
    means = {"rollout_gap_mean": absolute / tokens, "rollout_gap_kl": divergence / tokens}
    present = {**means, "rollout_gap_max": torch.where(tokens > 0, largest, torch.nan)}
    return {
        "train/rollout_gap_mean": float(absolute.sum() / everywhere),
        "train/rollout_gap_kl": float(divergence.sum() / everywhere),
        "train/rollout_gap_max": float(largest.max()),
        **_by_task(parts, present),
    }


def gap_warnings(recipe: TrainRecipe, values: Mapping[str, float]) -> Iterator[str]:
    """A line for each task whose mean gap between engine and trainer is above the recipe's threshold.

    Args:
        recipe: of the run.
        values: metrics of a step.
    """
    limit = recipe.policy.generation.gap_warning
    for task in recipe.env.tasks:
        gap = values.get(f"train/{task}/rollout_gap_mean", 0.0)
        if not gap <= limit:
            yield (
                f"warning: {task}: the rollout engine's log-probabilities are {gap:.3g} nats from the trainer's in the "
                f"mean (policy.generation.gap_warning: {limit:g}); `megatron-g2rpo doctor --rollout RECIPE` shows where"
            )


def answer_warnings(
    rollouts: Sequence[Rollout], env: Env, response_format: str, group: dist.ProcessGroup | None
) -> list[str]:
    """A line, with one response, where fewer than ``FEW_ANSWERS`` of the responses hold an answer. A collective.

    Args:
        rollouts: of this rank.
        env: the recipe's ``env`` section.
        response_format: of tasks that name none.
        group: the ranks that share the responses; None for all.
    """
    without = [rollout for rollout in rollouts if read(rollout, env, response_format).answer is None]
    counts = torch.tensor([len(rollouts) - len(without), len(rollouts)])
    dist.all_reduce(counts, group=group)
    answered, count = counts.tolist()
    if answered >= FEW_ANSWERS * count:
        return []
    examples: list[tuple[str, str] | None] = [None] * dist.get_world_size(group)
    mine = [(rollout.prompt.task, rollout.prompt.response_prefix + rollout.text) for rollout in without[:1]]
    dist.all_gather_object(examples, mine[0] if mine else None, group=group)
    task, text = next(example for example in examples if example is not None)
    name = env.tasks[task].response_format or response_format
    text = (
        text
        if len(text) <= SHOWN_CHARACTERS
        else f"{text[: SHOWN_CHARACTERS // 2]} [...] {text[-SHOWN_CHARACTERS // 2 :]}"
    )
    return [
        f"warning: {answered} of {count} responses hold an answer where the response format {name!r} has it; one of "
        f"{task} without: {text!r}. Let the prompts ask for the format (data.format_instruction: true), choose the one "
        "that the model writes (data.response_format), or teach it with `megatron-g2rpo sft`"
    ]


def importance_metrics(
    recipe: TrainRecipe, batches: Sequence[PackedBatch], group: dist.ProcessGroup
) -> dict[str, float]:
    """Shares of the loss's tokens whose importance weight was truncated or is 0 (its sequence masked). A collective."""
    cap = recipe.loss_fn.importance_sampling.truncated_ratio
    weights = [
        batch.importance_weights[batch.loss_mask != 0] for batch in batches if batch.importance_weights is not None
    ]
    if not weights:
        return {}
    mine = torch.cat(weights)
    truncated = (mine >= cap).sum() if cap is not None else torch.zeros(())
    sums = torch.stack([truncated, (mine == 0).sum(), torch.tensor(len(mine))]).double()
    dist.all_reduce(sums, group=group)
    truncated_share, masked_share = (sums[:2] / sums[2].clamp(min=1.0)).tolist()
    return {"train/importance_truncated": truncated_share, "train/importance_masked": masked_share}


def packing_metrics(batches: Sequence[PackedBatch], group: dist.ProcessGroup) -> dict[str, float]:
    """How well the step's micro-batches are packed, over all ranks. A collective.

    ``train/real_tokens``, the share of their tokens that are no padding, and ``train/micro_batches`` of a rank.
    """
    sums = torch.tensor(
        [sum(int((batch.segment_ids >= 0).sum()) for batch in batches), sum(len(batch.tokens) for batch in batches)],
        dtype=torch.float64,
    )
    dist.all_reduce(sums, group=group)
    return {"train/real_tokens": float(sums[0] / sums[1]), "train/micro_batches": float(len(batches))}


def mean_over(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each metric over those of the step's updates that have it."""
    names = dict.fromkeys(name for update in updates for name in update)
    values = {name: [update[name] for update in updates if name in update] for name in names}
    return {name: sum(numbers) / len(numbers) for name, numbers in values.items()}


def _means_by_task(parts: Components, tasks: Tensor, columns: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Rows of each task over all data-parallel ranks, float64 ``[T]``, and the means of the columns, NaN without rows.

    Args:
        tasks: int64 ``[N]``, of this rank's rows.
        columns: name -> float64 ``[N]``.
    """
    table = torch.stack([torch.ones(len(tasks), dtype=torch.float64), *columns.values()], dim=1)
    sums = torch.zeros(len(parts.tasks), table.shape[1], dtype=torch.float64).index_add_(0, tasks, table)
    dist.all_reduce(sums, group=parts.policy.groups.data)
    return sums[:, 0], {name: sums[:, column] / sums[:, 0] for column, name in enumerate(columns, start=1)}


def _by_task(parts: Components, means: Mapping[str, Tensor]) -> dict[str, float]:
    """``train/<task>/<name>`` of each ``[T]`` column; nothing where it is NaN."""
    return {
        f"train/{task}/{name}": float(value)
        for name, column in means.items()
        for task, value in zip(parts.tasks, column, strict=True)
        if not value.isnan()
    }
