# SPDX-License-Identifier: Apache-2.0
"""What pipeline stages tell one another before weights move."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from megatron_g2rpo.weights.checkpoint import CheckpointError

T = TypeVar("T")


def of_all_stages(make: Callable[[], T], pipeline_group: dist.ProcessGroup | None) -> list[T]:
    """What ``make`` returns on every stage. A collective.

    Args:
        make: called on every stage; its result is pickled.
        pipeline_group: None where the model is one stage.

    Returns:
        The results, in the order of the stages.

    Raises:
        CheckpointError: one stage raised it; all raise it with the same message.
        RuntimeError: another stage raised anything else. What ``make`` raises here is raised as it is; the other stages
            hear of it, so that none waits for this one in a collective.
    """
    if pipeline_group is None:
        return [make()]
    result: T | None = None
    failure: Exception | None = None
    try:
        result = make()
    except Exception as error:  # noqa: BLE001 (raised below, after the other stages have been told)
        failure = error
    # As text: not every exception can be pickled.
    told = None if failure is None else (type(failure).__name__, str(failure))
    outcomes: list[Any] = [None] * dist.get_world_size(pipeline_group)
    dist.all_gather_object(outcomes, (result, told), group=pipeline_group)
    if failure is not None:
        raise failure
    for stage, (_, other) in enumerate(outcomes):
        if other is not None:
            kind, message = other
            if kind == CheckpointError.__name__:
                raise CheckpointError(message)
            raise RuntimeError(f"pipeline stage {stage} failed: {kind}: {message}")
    return [result for result, _ in outcomes]
