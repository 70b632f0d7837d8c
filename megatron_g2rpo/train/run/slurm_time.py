# SPDX-License-Identifier: Apache-2.0
"""The end of the Slurm job that a run is in, and signals that say no more than that it is near."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping

SLURM_END = "SLURM_JOB_END_TIME"
SLURM_END_NAME = f"the end of the Slurm job ({SLURM_END})"
LONGER = "submit the job with a longer time limit"
# The scripts have Slurm tell them 120 seconds before the end (`--signal`); a busy machine passes it on late.
_NOTICE_S = 180.0


def seconds_left(environment: Mapping[str, str] = os.environ) -> float | None:
    """Return the seconds to the end of this process's Slurm job; None where there is none, or it has no limit."""
    end = environment.get(SLURM_END, "")
    return int(end) - time.time() if end.isdecimal() else None


def is_notice(number: int, forwarded: int, environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether a signal that is received now is Slurm's notice that the job's time is nearly over.

    Preemption, which moves a run to another time and place, ends with SIGTERM; but the scripts pass both on as one
    signal, which just before the end is taken for the notice.

    Args:
        number: the signal.
        forwarded: the signal by which the scripts pass a request on.
        environment: where Slurm says when its job ends.
    """
    left = seconds_left(environment)
    return number in (signal.SIGUSR1, forwarded) and left is not None and left < _NOTICE_S
