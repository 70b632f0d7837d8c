# SPDX-License-Identifier: Apache-2.0
"""The line of a step in the log of a run, which ``train.run.console`` prints where there is no terminal."""

from __future__ import annotations

import re


def row_of(step: int, label: str = "") -> re.Pattern[str]:
    """Return a pattern that finds the line of a step, with a first column of numbers, anywhere in a log.

    Args:
        step: number of the step.
        label: what each line begins with, ``0: `` where srun labels rank 0's.
    """
    return re.compile(rf"^{re.escape(label)}{step:>5} +-?\d+\.\d", re.MULTILINE)
