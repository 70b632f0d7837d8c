# SPDX-License-Identifier: Apache-2.0
"""From an evaluation's answers on file to its figures: per task and over tasks, each with its interval."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from megatron_g2rpo.commands.eval.answers_file import ANSWERS, UNUSABLE, EvaluationError, Record, read
from megatron_g2rpo.commands.eval.settings import Thresholds
from megatron_g2rpo.commands.eval.statistics import (
    CONFIDENCE,
    RESAMPLES,
    Array,
    Estimate,
    estimates,
    pass_at_k,
    pass_ks,
)

SUMMARY = "summary.json"
# An accuracy such as 1/3 + 2/3, added up in floats, is a success of 1.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Summary:
    """The figures of an evaluation.

    Attributes:
        samples: number of responses to each prompt.
        sizes: task -> number of prompts that were answered.
        unusable: task -> reason -> number of samples that could not be asked or scored, which no figure counts.
        by_task: task -> metric -> estimate: ``accuracy``, ``format``, ``reward``, ``response_tokens``, ``truncated``,
            ``pass@k``; means over prompts of the mean over the responses to a prompt.
        over_tasks: metric -> its mean over tasks, each with equal weight.
        over_samples: metric -> its mean over all prompts.
        thresholds: task -> the accuracy from which a response is a success, for ``pass@k``.
    """

    samples: int
    sizes: Mapping[str, int]
    unusable: Mapping[str, Mapping[str, int]]
    by_task: Mapping[str, Mapping[str, Estimate]]
    over_tasks: Mapping[str, Estimate]
    over_samples: Mapping[str, Estimate]
    thresholds: Mapping[str, float]


def summarise(directory: Path, thresholds: Thresholds) -> Summary:
    """Summarise the answers of an evaluation.

    Raises:
        EvaluationError: there is no answer.
    """
    rows: defaultdict[str, list[list[float]]] = defaultdict(list)
    names, samples = [], 0
    for responses in prompts(directory):
        task, samples = responses[0]["task"], len(responses)
        values = values_of(responses, thresholds.of(task))
        names = list(values)
        rows[task].append(list(values.values()))
    unusable: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for record in read(directory / UNUSABLE):
        unusable[record["task"]][record["reason"]] += 1
    if not rows:
        raise EvaluationError(f"none of the samples could be asked and scored; {directory / UNUSABLE} says why of each")
    tables: dict[str, Array] = {task: np.array(rows[task], dtype=np.float64) for task in sorted(rows)}
    found = estimates(tables)

    def named(values: Sequence[Estimate]) -> dict[str, Estimate]:
        return dict(zip(names, values, strict=True))

    return Summary(
        samples=samples,
        sizes={task: len(table) for task, table in tables.items()},
        unusable={task: dict(unusable[task]) for task in sorted(unusable)},
        by_task={task: named(values) for task, values in found.by_task.items()},
        over_tasks=named(found.over_tasks),
        over_samples=named(found.over_samples),
        thresholds={task: thresholds.of(task) for task in tables},
    )


def prompts(directory: Path) -> Iterator[list[Record]]:
    """Yield the responses of an evaluation, prompt by prompt."""
    for _, responses in groupby(read(directory / ANSWERS), key=lambda record: record["key"]):
        yield list(responses)


def values_of(responses: Sequence[Record], threshold: float) -> dict[str, float]:
    """The value of each metric for one prompt, from all responses to it."""
    accuracies = [response["parts"]["accuracy"] for response in responses]
    successes = sum(accuracy >= threshold - _ROUNDING for accuracy in accuracies)
    n = len(responses)
    return {
        "accuracy": sum(accuracies) / n,
        "format": sum(response["parts"]["format"] for response in responses) / n,
        "reward": sum(response["reward"] for response in responses) / n,
        "response_tokens": sum(response["response_tokens"] for response in responses) / n,
        "truncated": sum(response["truncated"] for response in responses) / n,
        **{f"pass@{k}": pass_at_k(n, successes, k) for k in pass_ks(n)},
    }


def write_summary(directory: Path, summary: Summary) -> None:
    """Write ``summary.json``."""
    tree: dict[str, Any] = {
        "samples": summary.samples,
        "confidence": CONFIDENCE,
        "resamples": RESAMPLES,
        "tasks": {
            task: {
                "prompts": summary.sizes[task],
                "unusable": summary.unusable.get(task, {}),
                "pass_threshold": summary.thresholds[task],
                **_metrics(metrics),
            }
            for task, metrics in summary.by_task.items()
        },
        "mean_over_tasks": _metrics(summary.over_tasks),
        "mean_over_samples": _metrics(summary.over_samples),
        # Also of tasks of which no sample is counted.
        "unusable": summary.unusable,
    }
    (directory / SUMMARY).write_text(json.dumps(tree, indent=2) + "\n")


def _metrics(metrics: Mapping[str, Estimate]) -> dict[str, Any]:
    return {name: asdict(estimate) for name, estimate in metrics.items()}
