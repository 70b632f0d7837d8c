# SPDX-License-Identifier: Apache-2.0
"""The input of every estimator: for each rollout its reward, the parts of it, a group id and a task id."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RewardBatch:
    """N rollouts as contiguous CPU tensors that share memory with the caller's where they can.

    Attributes:
        rewards: float32 or float64 ``[N]``, the rewards.
        group_ids: int64 ``[N]``, id of the prompt that a rollout answers; any values, any order.
        task_ids: int64 ``[N]``, id of the rollout's task; any values, any order.
        parts: name -> float64 ``[N]``, the parts of the rewards, unweighted, names ascending; empty where the caller
            has none.
        part_weights: name -> float64 ``[N]``, weight of each part in the reward, for the names of ``parts``. It may
            differ from task to task.
    """

    rewards: Tensor
    group_ids: Tensor
    task_ids: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)
    part_weights: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rewards)


def as_reward_batch(
    rewards: Tensor | np.ndarray,
    group_ids: Tensor | np.ndarray,
    task_ids: Tensor | np.ndarray,
    parts: Mapping[str, Tensor] | None = None,
    part_weights: Mapping[str, Tensor | float] | None = None,
) -> RewardBatch:
    """Make a ``RewardBatch``, after a check of types and shapes; values are not checked.

    Args:
        rewards: float32 or float64 ``[N]``, a CPU tensor or an array.
        group_ids: int64 ``[N]``; narrower integers are widened.
        task_ids: int64 ``[N]``; narrower integers are widened.
        parts: name -> float32 or float64 ``[N]``, the parts of the rewards; may be empty.
        part_weights: name -> a number, or float32 or float64 ``[N]``, for every part; None: 1 each.

    Raises:
        TypeError: an argument is neither a tensor nor an array, or has another dtype.
        ValueError: a tensor is not on the CPU, an argument is not one-dimensional, lengths differ, or the weights
            name other parts than ``parts``.
    """
    floats, integers = (torch.float32, torch.float64), (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    named = dict(sorted((parts or {}).items()))
    weights = dict.fromkeys(named, 1.0) if part_weights is None else part_weights
    if weights.keys() != named.keys():
        raise ValueError(
            f"part_weights must name every part of the reward and no other: it names "
            f"{', '.join(sorted(weights)) or 'none'}, the parts are {', '.join(named) or 'none'}"
        )
    batch = RewardBatch(
        rewards=_vector("rewards", rewards, floats),
        group_ids=_vector("group_ids", group_ids, integers).long(),
        task_ids=_vector("task_ids", task_ids, integers).long(),
        parts={name: _vector(f"part {name!r}", part, floats).double() for name, part in named.items()},
        part_weights={name: _weights(name, weights[name], len(rewards), floats) for name in named},
    )
    if not len(batch.rewards) == len(batch.group_ids) == len(batch.task_ids):
        raise ValueError(
            f"rewards, group_ids and task_ids need one entry a rollout, got lengths {len(batch.rewards)}, "
            f"{len(batch.group_ids)} and {len(batch.task_ids)}"
        )
    for kind, tensors in (("part", batch.parts), ("the weights of part", batch.part_weights)):
        for name, values in tensors.items():
            if len(values) != len(batch):
                raise ValueError(
                    f"{kind} {name!r} needs one entry a rollout, got length {len(values)} for {len(batch)}"
                )
    return batch


def _weights(name: str, weights: Tensor | float, count: int, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    if isinstance(weights, int | float):
        return torch.full((count,), float(weights), dtype=torch.float64)
    return _vector(f"the weights of part {name!r}", weights, dtypes).double()


def first_non_finite(rewards: Tensor) -> int | None:
    """Return the index of the first reward that is NaN or infinite, or None."""
    bad = ~torch.isfinite(rewards)
    return int(bad.nonzero()[0].item()) if bool(bad.any()) else None


def non_finite_message(batch: RewardBatch, index: int, where: str) -> str:
    """Return the error message for a non-finite reward: its value, group and task, and ``where`` it was found."""
    return (
        f"reward of {where} is {batch.rewards[index].item()} (group {batch.group_ids[index].item()}, "
        f"task {batch.task_ids[index].item()}); rewards must be finite"
    )


def _vector(name: str, values: Any, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    if isinstance(values, np.ndarray):
        # torch can't wrap read-only memory without a warning; a copy of it is the exception, not the rule.
        writable = values if values.flags.writeable else values.copy()
        try:
            values = torch.from_numpy(np.ascontiguousarray(writable) if writable.ndim else writable)
        except TypeError as error:
            raise TypeError(f"{name} has dtype {writable.dtype}; expected {_names(dtypes)}") from error
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must be a tensor or a numpy array, got {type(values).__name__}")
    if values.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {values.dtype}; expected {_names(dtypes)}")
    if values.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional [N], got shape {tuple(values.shape)}")
    if values.device.type != "cpu":
        raise ValueError(f"{name} is on {values.device}; move it to the CPU first")
    return values.detach().contiguous()


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
