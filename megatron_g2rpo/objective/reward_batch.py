# SPDX-License-Identifier: Apache-2.0
"""The rows every estimator reads: one reward, its components, one group id and one task id a rollout."""

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
        rewards: float32 or float64 ``[N]``.
        groups: int64 ``[N]``, id of the prompt a rollout answers; any values, any order.
        tasks: int64 ``[N]``, id of its task; any values, any order.
        parts: name -> float64 ``[N]``, the components of the rewards, unweighted, names ascending; empty where the
            caller has none.
    """

    rewards: Tensor
    groups: Tensor
    tasks: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rewards)


def as_reward_batch(
    rewards: Tensor | np.ndarray,
    groups: Tensor | np.ndarray,
    tasks: Tensor | np.ndarray,
    parts: Mapping[str, Tensor] | None = None,
) -> RewardBatch:
    """Checks types and shapes. Values are not looked at.

    Args:
        rewards: float32 or float64 ``[N]``, a CPU tensor or an array.
        groups: int64 ``[N]``; narrower integers are widened.
        tasks: int64 ``[N]``; likewise.
        parts: name -> float32 or float64 ``[N]``, the components of the rewards, or none.

    Raises:
        TypeError: an argument that is neither a tensor nor an array, or has another dtype.
        ValueError: a tensor that is not on the CPU, an argument that is not one-dimensional, unequal lengths.
    """
    floats, integers = (torch.float32, torch.float64), (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    rows = RewardBatch(
        rewards=_vector("rewards", rewards, floats),
        groups=_vector("groups", groups, integers).long(),
        tasks=_vector("tasks", tasks, integers).long(),
        parts={name: _vector(f"part {name!r}", part, floats).double() for name, part in sorted((parts or {}).items())},
    )
    if not len(rows.rewards) == len(rows.groups) == len(rows.tasks):
        raise ValueError(
            f"rewards, groups and tasks need one entry a rollout, got lengths {len(rows.rewards)}, {len(rows.groups)} "
            f"and {len(rows.tasks)}"
        )
    for name, part in rows.parts.items():
        if len(part) != len(rows):
            raise ValueError(f"part {name!r} needs one entry a rollout, got length {len(part)} for {len(rows)}")
    return rows


def first_non_finite(rewards: Tensor) -> int | None:
    """Returns the index of the first reward that is NaN or infinite, or None."""
    bad = ~torch.isfinite(rewards)
    return int(bad.nonzero()[0].item()) if bool(bad.any()) else None


def non_finite_message(rows: RewardBatch, index: int, where: str) -> str:
    """Names a non-finite reward: its value, group and task, and ``where`` it was found."""
    return (
        f"reward of {where} is {rows.rewards[index].item()} (group {rows.groups[index].item()}, "
        f"task {rows.tasks[index].item()}); rewards must be finite"
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
