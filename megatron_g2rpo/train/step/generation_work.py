# SPDX-License-Identifier: Apache-2.0
"""What generation computed in a step, and what it saved by computing a prompt and its images once."""

from __future__ import annotations

from dataclasses import astuple

import torch

from megatron_g2rpo.collectives import all_reduce
from megatron_g2rpo.rollout.base import Engine, GenerationWork, work_of

_NAMES = (
    "rollout_prompt_tokens",
    "rollout_prompt_tokens_saved",
    "rollout_decoded_tokens",
    "rollout_patches",
    "rollout_patches_saved",
)


class StepWork:
    """Sums the work of a step's calls of the engine, one or several rounds of them."""

    def __init__(self) -> None:
        self._sum: GenerationWork | None = None

    def add(self, engine: Engine) -> None:
        """Add the engine's last call, if it counts its work."""
        work = work_of(engine)
        if work is not None:
            self._sum = work if self._sum is None else self._sum + work

    def metrics(self) -> dict[str, float]:
        """Return ``work/rollout_...``, summed over all ranks; nothing for an engine that does not count. A collective.

        Whether it counts is a matter of its class, which is the same on all ranks.
        """
        if self._sum is None:
            return {}
        total = torch.tensor(astuple(self._sum), dtype=torch.int64)
        all_reduce(total)
        return {f"work/{name}": float(value) for name, value in zip(_NAMES, total.tolist(), strict=True)}
