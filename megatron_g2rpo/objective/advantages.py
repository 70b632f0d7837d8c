# SPDX-License-Identifier: Apache-2.0
"""Gaussian advantages and group statistics: public functions on top of the compiled op or its torch replacement.

Source: "OpenVLThinkerV2: A Generalist Multimodal Reasoning Model for Multi-domain Visual Tasks", arXiv 2604.08539.
"""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from megatron_g2rpo.objective import group_ops_torch
from megatron_g2rpo.objective.reward_batch import as_reward_batch

STAGES = ("group", "task")
TIE_TOLERANCE = 1e-6

_EXTENSION = "megatron_g2rpo.objective._group_ops"


def _load_extension() -> ModuleType | None:
    """Import the compiled op; warn if it was never built, and raise if it was built but is broken."""
    try:
        return importlib.import_module(_EXTENSION)
    except ModuleNotFoundError as error:
        if error.name != _EXTENSION:
            raise
        warnings.warn(
            f"{_EXTENSION} is not built: advantages run on the slower torch implementation (same results to 1e-12). "
            "Reinstall the package with a C++17 compiler to build it.",
            stacklevel=2,
        )
        return None


_extension = _load_extension()


def backend() -> Literal["cpp", "torch"]:
    """Return which implementation computes advantages and statistics: the compiled op, or torch if it is not built."""
    return "torch" if _extension is None else "cpp"


@dataclass(frozen=True, kw_only=True)
class SetStatistics:
    """Reward statistics of K sets (groups or tasks), one entry per set, ids ascending.

    Attributes:
        id: int64 ``[K]``, id of the set.
        count: int64 ``[K]``, number of rollouts in the set.
        mean: float64 ``[K]``, mean reward.
        std: float64 ``[K]``, population standard deviation of the rewards.
        min: float64 ``[K]``, smallest reward.
        max: float64 ``[K]``, largest reward.
        distinct: int64 ``[K]``, number of distinct rewards; rewards within the tie tolerance count as one.
    """

    id: Tensor
    count: Tensor
    mean: Tensor
    std: Tensor
    min: Tensor
    max: Tensor
    distinct: Tensor

    @property
    def zero_variance(self) -> Tensor:
        """The sets without spread: bool ``[K]``, True where all rewards of the set are equal."""
        return self.distinct == 1


@dataclass(frozen=True, kw_only=True)
class GroupStatistics:
    """Reward statistics of a batch, by group (prompt) and by task."""

    groups: SetStatistics
    tasks: SetStatistics


def gaussian_advantages(
    rewards: Tensor | np.ndarray,
    group_ids: Tensor | np.ndarray,
    task_ids: Tensor | np.ndarray,
    *,
    stages: Sequence[str] = STAGES,
    tie_tolerance: float = TIE_TOLERANCE,
    zero_variance: str = "drop",
    variance: str = "as_is",
) -> Tensor:
    """Map rewards to N(0, 1) by optimal transport, within every group and then within every task.

    In each stage, the k-th smallest of the n values of a set (k = 1..n) becomes ``Phi^-1((k - 1/2) / n)``, and tied
    values share the mean of theirs. A set of one value maps to 0. The result does not depend on the order of the
    rollouts, bit for bit. A set is defined by its id alone.

    Args:
        rewards: float32 or float64 ``[N]``; computed in float64.
        group_ids: int64 ``[N]``, ids of the prompts.
        task_ids: int64 ``[N]``, ids of the tasks.
        stages: the sets to map within, in order: ``"group"``, ``"task"`` or both.
        tie_tolerance: values closer than this are equal, and so are chains of them (a ~ b ~ c); equal values are
            always tied. It applies to every stage.
        zero_variance: what becomes of the rollouts of a set whose values are all equal. ``"drop"``: they get 0 and take
            no rank in later stages. ``"keep"``: they enter the later stages at 0.
        variance: ``"as_is"``: the midpoint quantiles, whose standard deviation is below 1 (0.923 for 8 distinct
            values). ``"unit"``: the advantages of every task, dropped rollouts aside, are divided by their population
            standard deviation.

    Returns:
        float64 ``[N]``, in the order of the rollouts.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: lengths differ, an option is unknown, or a reward is not finite (its index, group and task are
            named).
    """
    check_options(stages=stages, tie_tolerance=tie_tolerance, zero_variance=zero_variance, variance=variance)
    batch = as_reward_batch(rewards, group_ids, task_ids)
    drop, unit = zero_variance == "drop", variance == "unit"
    if _extension is None:
        return group_ops_torch.gaussian_advantages(
            batch, stages=stages, tie_tolerance=tie_tolerance, drop_zero_variance=drop, unit_variance=unit
        )
    views = (batch.rewards.numpy(), batch.group_ids.numpy(), batch.task_ids.numpy())
    return torch.from_numpy(_extension.gaussian_advantages(*views, list(stages), tie_tolerance, drop, unit))


def group_statistics(
    rewards: Tensor | np.ndarray,
    group_ids: Tensor | np.ndarray,
    task_ids: Tensor | np.ndarray,
    *,
    tie_tolerance: float = TIE_TOLERANCE,
) -> GroupStatistics:
    """Compute counts, moments and ranges of the rewards of every group and of every task.

    Args:
        rewards: float32 or float64 ``[N]``; computed in float64.
        group_ids: int64 ``[N]``, ids of the prompts.
        task_ids: int64 ``[N]``, ids of the tasks.
        tie_tolerance: rewards closer than this count as one distinct value.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: lengths differ, the tolerance is invalid, or a reward is not finite (its index, group and task are
            named).
    """
    _check_tolerance(tie_tolerance)
    batch = as_reward_batch(rewards, group_ids, task_ids)
    if _extension is None:
        by_group = group_ops_torch.set_statistics(batch, batch.group_ids, tie_tolerance)
        by_task = group_ops_torch.set_statistics(batch, batch.task_ids, tie_tolerance)
    else:
        views = (batch.rewards.numpy(), batch.group_ids.numpy(), batch.task_ids.numpy())
        by_group, by_task = map(_tensors, _extension.group_statistics(*views, tie_tolerance))
    return GroupStatistics(groups=SetStatistics(**by_group), tasks=SetStatistics(**by_task))


def check_options(*, stages: Sequence[str], tie_tolerance: float, zero_variance: str, variance: str) -> None:
    """Check the options of ``gaussian_advantages``.

    Raises:
        ValueError: an option is unknown; the message names it.
    """
    _check_tolerance(tie_tolerance)
    unknown = isinstance(stages, str) or any(stage not in STAGES for stage in stages)
    if unknown or not stages or len(set(stages)) != len(stages):
        raise ValueError(f"stages must be a list of one or both of {STAGES}, each once, got {stages!r}")
    if zero_variance not in ("drop", "keep"):
        raise ValueError(f"zero_variance must be 'drop' or 'keep', got {zero_variance!r}")
    if variance not in ("as_is", "unit"):
        raise ValueError(f"variance must be 'as_is' or 'unit', got {variance!r}")


def _tensors(columns: dict[str, Any]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(column) for name, column in columns.items()}


def _check_tolerance(tie_tolerance: float) -> None:
    if not (math.isfinite(tie_tolerance) and tie_tolerance >= 0.0):
        raise ValueError(f"tie_tolerance must be finite and not negative, got {tie_tolerance}")
