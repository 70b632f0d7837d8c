# SPDX-License-Identifier: Apache-2.0
"""Two evaluations side by side: the accuracy on the prompts that both answered."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_g2rpo.commands.eval import identity
from megatron_g2rpo.commands.eval.answers_file import EvaluationError, Record
from megatron_g2rpo.commands.eval.statistics import Comparison, Paired, paired
from megatron_g2rpo.commands.eval.summary import prompts

COMPARISON = "comparison.json"
# Only an answer to the same question, held against the same reference, is compared.
_SAME = ("task", "question", "reference", "answer_format")


@dataclass(frozen=True)
class Compared:
    """Two evaluations, compared.

    Attributes:
        earlier, later: their directories.
        comparison: of the accuracy.
        differences: what differs between them beside the model, a line each.
        only_earlier, only_later: number of samples that only one of them answered.
        changed: number of samples of one name that are other questions: they are left out.
    """

    earlier: Path
    later: Path
    comparison: Comparison
    differences: list[str]
    only_earlier: int
    only_later: int
    changed: int


def compare(earlier: Path, later: Path) -> Compared:
    """Compare the accuracies of two evaluations, prompt by prompt.

    The data may differ: what is compared are the samples with the same name, task, question, reference and answer
    format in both.

    Raises:
        EvaluationError: a directory holds no evaluation, or no sample is in both.
    """
    theirs, mine = identity.load(earlier), identity.load(later)
    first, second = _accuracies(earlier), _accuracies(later)
    both = [key for key in second if key in first]
    same = [key for key in both if first[key][0] == second[key][0]]
    if not same:
        raise EvaluationError(
            f"{earlier} and {later} have no sample in common ({len(both)} of the same name are other questions): "
            "compare evaluations of the same data"
        )
    pairs: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)
    for key in same:
        pairs[second[key][0]["task"]].append((first[key][1], second[key][1]))
    columns = {task: np.array(pairs[task], dtype=np.float64) for task in sorted(pairs)}
    return Compared(
        earlier=earlier,
        later=later,
        comparison=paired(
            {task: column[:, 0] for task, column in columns.items()},
            {task: column[:, 1] for task, column in columns.items()},
        ),
        differences=[line for line in identity.differences(theirs, mine) if not line.startswith("model:")],
        only_earlier=len(first) - len(both),
        only_later=len(second) - len(both),
        changed=len(both) - len(same),
    )


def _accuracies(directory: Path) -> dict[str, tuple[Record, float]]:
    """Key -> what was asked, and the mean accuracy of the responses."""
    return {
        responses[0]["key"]: (
            {name: responses[0][name] for name in _SAME},
            sum(response["parts"]["accuracy"] for response in responses) / len(responses),
        )
        for responses in prompts(directory)
    }


def write_comparison(directory: Path, compared: Compared) -> None:
    """Write ``comparison.json``."""
    comparison = compared.comparison
    tree: dict[str, Any] = {
        "earlier": str(compared.earlier),
        "later": str(compared.later),
        "differences": compared.differences,
        "only_earlier": compared.only_earlier,
        "only_later": compared.only_later,
        "changed": compared.changed,
        "accuracy": {
            "tasks": _trees(comparison.by_task),
            "mean_over_tasks": asdict(comparison.over_tasks),
            "mean_over_samples": asdict(comparison.over_samples),
        },
    }
    (directory / COMPARISON).write_text(json.dumps(tree, indent=2) + "\n")


def _trees(by_task: Mapping[str, Paired]) -> dict[str, Any]:
    return {task: asdict(each) for task, each in by_task.items()}
