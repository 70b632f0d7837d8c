# SPDX-License-Identifier: Apache-2.0
"""``logger.profile``: a trace of some steps on some ranks, and the memory's history for when it is short.

A trace is a Chrome trace, gzipped (https://ui.perfetto.dev opens it), in which each phase of the step has its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from torch.profiler import profile, record_function

from megatron_g2rpo import progress
from megatron_g2rpo.policy.device import Device
from megatron_g2rpo.recipe.run_sections import Logger

FOLDER = "profile"


class StepProfiler:
    """Records the steps that a recipe names; where ``logger.profile`` is off, it does nothing.

    Args:
        section: the recipe's ``logger``.
        device: this rank's device.
        note: shows the user a line.
    """

    def __init__(self, section: Logger, device: Device, note: Callable[[str], None]) -> None:
        options, self._rank = section.profile, dist.get_rank()
        self._steps = options.steps if options.enabled and self._rank in options.ranks else ()
        self._folder, self._device, self._note = Path(section.log_dir) / FOLDER, device, note
        self._with_stack = options.with_stack
        if options.enabled and options.memory_history:
            device.record_memory_history(options.memory_history)

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Record what the body does if the step is one of those; a step that fails leaves no trace.

        A trace that cannot be written is said, and ends nothing.
        """
        if step not in self._steps:
            yield
            return
        path = self._folder / f"step_{step}-rank_{self._rank}.json.gz"
        with (
            profile(activities=self._device.profiler_activities(), with_stack=self._with_stack) as recorded,
            record_function(f"step {step}"),
        ):
            yield
        progress.advance()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            recorded.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:  # torch's writer raises the latter where it cannot open the file
            self._note(f"warning: no trace of step {step}: {path}: {error}")
            return
        self._note(f"step {step}: its trace is {path}")
