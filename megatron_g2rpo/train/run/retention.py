# SPDX-License-Identifier: Apache-2.0
"""Which checkpoints of a run are kept: the newest, and the best by a metric of the validation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Retention:
    """What to keep.

    Attributes:
        keep_top_k: how many checkpoints to keep; None for all.
        metric_name: the metric of the validation that ranks them; None ranks them by their step.
        higher_is_better: whether the largest value of the metric is the best.
    """

    keep_top_k: int | None = None
    metric_name: str | None = None
    higher_is_better: bool = True

    def kept(self, checkpoints: Mapping[int, Mapping[str, float]]) -> set[int]:
        """Choose among checkpoints that are whole.

        The newest is always among them, which a run goes on from: beside the ``keep_top_k`` best where it is none of
        these. Of equals the newer is better. One without the metric, as those before a run's first validation, comes
        after all that have it.

        Args:
            checkpoints: step -> metrics of the last validation at or before it.

        Returns:
            The steps to keep.
        """
        if self.keep_top_k is None:
            return set(checkpoints)
        ranked = sorted(checkpoints, key=lambda step: (*self._merit(checkpoints[step]), step), reverse=True)
        return {*ranked[: self.keep_top_k], *([max(checkpoints)] if checkpoints else [])}

    def _merit(self, metrics: Mapping[str, float]) -> tuple[bool, float]:
        value = metrics.get(self.metric_name, math.nan) if self.metric_name is not None else math.nan
        if not math.isfinite(value):
            return False, 0.0
        return True, value if self.higher_is_better else -value
