# SPDX-License-Identifier: Apache-2.0
"""Names of what a validation measures, which a recipe may rank its checkpoints by."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

# Of every response; of greedy ones with `greedy_` before it.
MEASURED = ("reward", "accuracy", "format", "response_tokens", "truncated")
# Where the recipe gives them a weight, which may be 0.
OF_REWARDS = ("accuracy", "format")


def validation_metrics(tasks: Iterable[str], weighed: Iterable[str]) -> Iterator[str]:
    """Iterate over the metrics of every validation.

    Args:
        tasks: the recipe's tasks; one of which there is no validation data has no metrics all the same.
        weighed: reward parts that have a weight.
    """
    parts = set(weighed)
    names = [name for name in MEASURED if name not in OF_REWARDS or name in parts]
    for prefix in ("", "greedy_"):
        for name in names:
            yield f"val/mean_{prefix}{name}"
    for task in tasks:
        for prefix in ("", "greedy_"):
            for name in names:
                yield f"val/{task}/{prefix}{name}"


def unmeasured(metric: str | None, tasks: Collection[str]) -> str | None:
    """Return why a metric that ranks checkpoints is never measured, a sentence; None where it is, or none ranks them.

    Args:
        metric: ``checkpointing.metric_name``, one of ``validation_metrics``.
        tasks: the tasks that there is validation data of.
    """
    task, _, name = (metric or "").removeprefix("val/").rpartition("/")
    if not task or task in tasks:
        return None
    return (
        f"checkpointing.metric_name: {metric} is never measured, as data.validation has no usable sample of task "
        f"{task}; it has {', '.join(sorted(tasks))} (val/mean_{name} is over all that it has)"
    )
