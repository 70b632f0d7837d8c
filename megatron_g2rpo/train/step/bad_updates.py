# SPDX-License-Identifier: Apache-2.0
"""Updates that would harm the policy: they are skipped, counted and recorded, and too many in a row end the run.

A loss or a gradient that is not finite would write itself into every weight. A norm far above those before it is
clipped, but its direction is that of a few tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

from megatron_g2rpo.collectives import all_reduce, from_first, gather, on_all_ranks
from megatron_g2rpo.recipe.policy_section import Optimizer
from megatron_g2rpo.types import Rewards, Rollout


class UpdateGuard:
    """Decides which updates are taken; every rank decides alike.

    Args:
        options: the recipe's ``policy.megatron_cfg.optimizer``.
        directory: folder for the batches of updates that were skipped.
    """

    def __init__(self, options: Optimizer, directory: Path) -> None:
        self._options, self._directory = options, directory
        self._norms: list[float] = []
        self._in_a_row = 0
        self._last: tuple[float, float, str | None] = (0.0, 0.0, None)

    def skips(self, loss: float, grad_norm: float) -> bool:
        """Whether an update is skipped. A collective of all ranks where spikes are looked for.

        Args:
            loss: its loss, equal on all ranks.
            grad_norm: norm of its gradient before clipping, equal on all ranks.
        """
        why = self._why(loss, grad_norm)
        if self._options.grad_norm_spike_factor is not None:
            # A norm at the border may differ in its last digit between replicas.
            any_ = torch.tensor([why is not None], dtype=torch.int32)
            all_reduce(any_, op=dist.ReduceOp.MAX)
            why = why or ("the gradient's norm is a spike on another rank" if any_ else None)
        self._last = (loss, grad_norm, why)
        self._in_a_row = 0 if why is None else self._in_a_row + 1
        if why is None and self._options.grad_norm_spike_factor is not None:
            self._norms = [*self._norms, grad_norm][-self._options.grad_norm_spike_window :]
        return why is not None

    def _why(self, loss: float, grad_norm: float) -> str | None:
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return f"the gradient's norm is {grad_norm} at loss {loss}"
        factor, window = self._options.grad_norm_spike_factor, self._options.grad_norm_spike_window
        if factor is None or len(self._norms) < window:
            return None
        usual = median(self._norms)
        if grad_norm <= factor * usual:
            return None
        return f"the gradient's norm is {grad_norm:.4g}, more than {factor:g} times the median of {usual:.4g}"

    def settle(
        self,
        step: int,
        number: int,
        samples: Callable[[], Sequence[Mapping[str, Any]]],
        *,
        group: dist.ProcessGroup,
        note: Callable[[str], None],
    ) -> None:
        """Record the update that was just looked at, if it was skipped. A collective of all ranks.

        Args:
            step: number of the step, from 1.
            number: number of the update in the step, from 0.
            samples: returns what is recorded of each of this rank's sequences.
            group: the ranks that hold other sequences of the update.
            note: shows the user a line.

        Raises:
            FloatingPointError: more updates in a row than ``max_skipped_updates`` were to be skipped.
        """
        loss, grad_norm, why = self._last
        if why is None:
            return
        shares = gather(lambda: list(samples()), group)
        record = {
            "step": step,
            "update": number,
            "why": why,
            "loss": _number(loss),
            "grad_norm": _number(grad_norm),
            "samples": [{name: _number(value) for name, value in each.items()} for share in shares for each in share],
        }
        file = from_first(lambda: self._write(record, f"step_{step}.update_{number}.json"))
        limit = self._options.max_skipped_updates
        if self._in_a_row > limit:
            before = f"; {limit} before it were skipped (policy.megatron_cfg.optimizer.max_skipped_updates)"
            raise on_all_ranks(
                FloatingPointError(
                    f"step {step}: {why}; no optimizer step was taken{before if limit else ''}; the batch is in {file}"
                )
            )
        note(f"warning: step {step}: {why}; the update is skipped, and its batch is in {file}")

    def _write(self, record: Mapping[str, Any], name: str) -> str:
        self._directory.mkdir(parents=True, exist_ok=True)
        file = self._directory / name
        file.write_text(json.dumps(record, ensure_ascii=False))
        return str(file)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps: the recent norms, and how many updates in a row were skipped."""
        return {"norms": list(self._norms), "in_a_row": self._in_a_row}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from ``state_dict``."""
        self._norms, self._in_a_row = list(state["norms"]), int(state["in_a_row"])


def rollout_records(rollouts: Sequence[Rollout], rewards: Rewards, chosen: Sequence[int]) -> list[dict[str, Any]]:
    """What is recorded of an update's rollouts.

    Args:
        rollouts: this rank's rollouts of the step.
        rewards: their rewards.
        chosen: which of them the update has.
    """
    return [
        {
            "key": rollouts[index].prompt.key,
            "task": rollouts[index].prompt.task,
            "sample_index": rollouts[index].sample_index,
            "response_ids": rollouts[index].response_ids.tolist(),
            "reward": float(rewards.total[index]),
        }
        for index in chosen
    ]


def _number(value: Any) -> Any:
    """A value as JSON has it, which knows no numbers that are not finite: those become text."""
    return value if not isinstance(value, float) or math.isfinite(value) else str(value)
