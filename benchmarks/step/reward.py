# SPDX-License-Identifier: Apache-2.0
"""The benchmark's reward as a part of ours; the recipe of ``ours`` imports this file."""

from __future__ import annotations

from benchmarks.step.workload import reward
from megatron_g2rpo.extend import reward_part
from megatron_g2rpo.types import Response, Sample


@reward_part("odd_characters")
def odd_characters(sample: Sample, response: Response) -> float:
    """The share of the response's characters with an odd code."""
    return reward(response.text)
