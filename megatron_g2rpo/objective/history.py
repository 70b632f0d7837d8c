# SPDX-License-Identifier: Apache-2.0
"""The memory of an advantage estimator, which it carries from step to step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Moments:
    """A first and a second moment, expressed as a mean and a population standard deviation."""

    mean: float
    std: float


class History:
    """The memory of an estimator from step to step: EMA-GRPO's moments by task id. It is equal on every rank.

    Attributes:
        moments: task id -> the moving averages of the moments of its rewards; tasks never met are absent.
    """

    def __init__(self) -> None:
        self.moments: dict[int, Moments] = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the state for a checkpoint: plain dictionaries, lists and numbers, which survive JSON bit for bit."""
        moments = {str(task): [of_task.mean, of_task.std] for task, of_task in sorted(self.moments.items())}
        return {"moments": moments}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace this history by the one that ``state_dict`` returned.

        Raises:
            ValueError: the state has another form.
        """
        try:
            if set(state) != {"moments"}:
                raise ValueError(f"its keys are {sorted(state)}")
            loaded = {int(task): Moments(float(mean), float(std)) for task, (mean, std) in state["moments"].items()}
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(f"not a state of an estimator's history: {error}") from error
        self.moments = loaded
