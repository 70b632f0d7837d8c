# SPDX-License-Identifier: Apache-2.0
"""The tables that ``megatron-g2rpo eval`` prints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from megatron_g2rpo.commands.eval.answers_file import ANSWERS, UNUSABLE
from megatron_g2rpo.commands.eval.compare import Compared
from megatron_g2rpo.commands.eval.statistics import CONFIDENCE, RESAMPLES, Estimate, Paired
from megatron_g2rpo.commands.eval.summary import SUMMARY, Summary

OVER_TASKS, OVER_SAMPLES = "mean over tasks", "mean over samples"
# Metric -> heading, and the format of its number; pass@k follows.
_COLUMNS = {
    "accuracy": ("accuracy", ".3f"),
    "format": ("format", ".3f"),
    "response_tokens": ("tokens", ".1f"),
    "truncated": ("truncated", ".3f"),
}


def summary_table(summary: Summary, directory: Path) -> RenderableType:
    """Show the figures of an evaluation, and what they do not count.

    Args:
        summary: the figures.
        directory: the evaluation's directory.
    """
    passes = [name for name in summary.over_tasks if name.startswith("pass@")]
    columns = {**_COLUMNS, **{name: (name, ".3f") for name in passes}}
    table = _table("task", "prompts", *(heading for heading, _ in columns.values()))
    for task, metrics in summary.by_task.items():
        table.add_row(task, str(summary.sizes[task]), *_cells(metrics, columns))
    table.add_section()
    total = str(sum(summary.sizes.values()))
    table.add_row(OVER_TASKS, total, *_cells(summary.over_tasks, columns))
    table.add_row(OVER_SAMPLES, total, *_cells(summary.over_samples, columns))
    lines = [
        f"{summary.samples} response(s) to each prompt; in brackets the {CONFIDENCE:.0%} bootstrap interval over "
        f"prompts ({RESAMPLES:,} resamples); {_thresholds(summary)}",
        *_left_out(summary, directory),
        f"every answer: {directory / ANSWERS}; the figures: {directory / SUMMARY}",
    ]
    return Group(table, Text("\n".join(lines)))


def comparison_table(compared: Compared) -> RenderableType:
    """Show two evaluations side by side."""
    table = _table("task", "prompts", "earlier", "now", "difference in accuracy", "p")
    for task, each in compared.comparison.by_task.items():
        table.add_row(task, *_paired(each))
    table.add_section()
    table.add_row(OVER_TASKS, *_paired(compared.comparison.over_tasks))
    table.add_row(OVER_SAMPLES, *_paired(compared.comparison.over_samples))
    lines = [f"earlier: {compared.earlier}; paired by prompt: bootstrap interval, p of the sign-flip permutation test"]
    if compared.only_earlier or compared.only_later or compared.changed:
        lines.append(
            f"not compared: {compared.only_earlier} samples that only the earlier one answered, {compared.only_later} "
            f"that only this one did, {compared.changed} of the same name that are other questions"
        )
    if compared.differences:
        lines.append("beside the model, the two differ in:")
        lines += [f"  {line}" for line in compared.differences]
    return Group(table, Text("\n".join(lines)))


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number == 0 else "right", overflow="fold")
    return table


def _cells(metrics: Mapping[str, Estimate], columns: Mapping[str, tuple[str, str]]) -> list[str]:
    return [_estimate(metrics[name], form) for name, (_, form) in columns.items()]


def _estimate(estimate: Estimate, form: str) -> str:
    if estimate.low is None or estimate.high is None:
        return f"{estimate.mean:{form}}"
    return f"{estimate.mean:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"


def _paired(each: Paired) -> list[str]:
    p_value = f"{each.p_value:.4f}" if each.p_value >= 1e-4 else "< 0.0001"
    difference = _estimate(each.difference, "+.3f")
    return [str(each.n), f"{each.earlier:.3f}", f"{each.later:.3f}", difference, p_value]


def _thresholds(summary: Summary) -> str:
    values = sorted(set(summary.thresholds.values()))
    if len(values) == 1:
        return f"pass: accuracy of at least {values[0]:g}"
    named = ", ".join(f"{task} {value:g}" for task, value in summary.thresholds.items())
    return f"pass: accuracy of at least ({named})"


def _left_out(summary: Summary, directory: Path) -> list[str]:
    reasons: dict[str, int] = {}
    for counts in summary.unusable.values():
        for reason, count in counts.items():
            reasons[reason] = reasons.get(reason, 0) + count
    if not reasons:
        return []
    named = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))
    tasks = ", ".join(f"{task} {sum(counts.values())}" for task, counts in summary.unusable.items())
    return [
        f"NOT COUNTED: samples that could not be asked or scored: {named} ({tasks}); listed in {directory / UNUSABLE}"
    ]
