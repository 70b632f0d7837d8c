# SPDX-License-Identifier: Apache-2.0
"""Claims: figures are means over prompts of what is on file, comparisons pair the same questions, tables say it all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType

from megatron_g2rpo.commands.eval.answers_file import ANSWERS, UNUSABLE, EvaluationError, append
from megatron_g2rpo.commands.eval.compare import compare, write_comparison
from megatron_g2rpo.commands.eval.identity import claim
from megatron_g2rpo.commands.eval.settings import Thresholds
from megatron_g2rpo.commands.eval.show import comparison_table, summary_table
from megatron_g2rpo.commands.eval.summary import summarise, write_summary


def evaluation(
    directory: Path,
    accuracies: dict[str, Sequence[Sequence[float]]],
    *,
    first: int = 0,
    samples: int = 1,
    **changes: Any,
) -> Path:
    """An evaluation on file: task -> prompts -> accuracy of each response; ``changes`` go into each line."""
    claim(directory, {"model": str(directory), "sampling.samples": samples}, {}, fresh=False)
    for task, prompts in accuracies.items():
        for number, responses in enumerate(prompts, start=first):
            line = {"key": f"{task}-{number}", "task": task, "question": "?", "reference": f"{number}"}
            line |= {"answer_format": "exact", "response_tokens": 10 + number, "truncated": number == 1, **changes}
            append(
                directory / ANSWERS,
                ({**line, "reward": a + 0.1, "parts": {"accuracy": a, "format": 1.0}} for a in responses),
            )
    return directory


def shown(what: RenderableType, width: int = 300) -> str:
    console = Console(width=width, highlight=False)
    with console.capture() as capture:
        console.print(what)
    return capture.get()


def test_figures_are_means_over_prompts_of_means_over_responses(tmp_path: Path) -> None:
    evaluation(tmp_path, {"box": [[0.6, 0.4], [0.2, 0.1]], "word": [[1.0, 0.0]]})
    append(tmp_path / UNUSABLE, [{"key": "box-9", "task": "box", "reason": "too_long", "message": "m"}])
    summary = summarise(tmp_path, Thresholds.parsed(["box=0.5"]))
    box, word = summary.by_task["box"], summary.by_task["word"]
    assert box["accuracy"].mean == pytest.approx((0.5 + 0.15) / 2)
    assert (box["response_tokens"].mean, box["truncated"].mean) == (10.5, 0.5)
    assert box["reward"].mean == pytest.approx(0.425)
    # One of two responses to the first prompt overlaps by half.
    assert (box["pass@1"].mean, box["pass@2"].mean) == (0.25, 0.5)
    assert (word["pass@1"].mean, word["pass@2"].mean) == (0.5, 1.0)
    assert summary.over_tasks["pass@2"].mean == 0.75
    assert summary.over_samples["pass@2"].mean == pytest.approx(2 / 3)
    assert (summary.sizes, summary.unusable) == ({"box": 2, "word": 1}, {"box": {"too_long": 1}})

    write_summary(tmp_path, summary)
    tree = json.loads((tmp_path / "summary.json").read_text())
    assert tree["tasks"]["box"]["pass_threshold"] == 0.5
    assert tree["tasks"]["box"]["accuracy"].keys() == {"mean", "low", "high"}
    assert tree["tasks"]["word"]["accuracy"] == {"mean": 0.5, "low": None, "high": None}
    assert tree["mean_over_tasks"]["pass@1"]["mean"] == 0.375


def test_the_table_says_what_is_not_counted(tmp_path: Path) -> None:
    evaluation(tmp_path, {"box": [[0.5], [1.0]], "word": [[1.0], [1.0]]})
    unusable = [("box", "too_long"), ("word", "unreadable"), ("gone", "unreadable")]
    records = [
        {"key": f"{number}", "task": task, "reason": reason, "message": ""}
        for number, (task, reason) in enumerate(unusable)
    ]
    append(tmp_path / UNUSABLE, records)
    text = shown(summary_table(summarise(tmp_path, Thresholds()), tmp_path))
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert rows[1].startswith("box 2 0.750 [0.500, 1.000] 1.000 [1.000, 1.000] 10.5 [10.0, 11.0] 0.500 [0.000, 1.000]")
    assert rows[3].startswith("mean over tasks 4 0.875 [0.750, 1.000]")
    assert "1 too_long, 2 unreadable (box 1, gone 1, word 1)" in text
    assert "pass: accuracy of at least 1\n" in text


def test_a_narrow_table_wraps_and_loses_no_digit(tmp_path: Path) -> None:
    evaluation(tmp_path, {"box": [[0.5], [1.0]]})
    wide, narrow = (shown(summary_table(summarise(tmp_path, Thresholds()), tmp_path), width) for width in (300, 80))
    assert "…" not in narrow
    assert narrow.count("1.000") == wide.count("1.000")


def test_an_evaluation_without_an_answer_has_no_figures(tmp_path: Path) -> None:
    append(tmp_path / UNUSABLE, [{"key": "k", "task": "t", "reason": "too_long", "message": "m"}])
    with pytest.raises(
        EvaluationError, match=r"none of the samples could be asked and scored; .*unusable.jsonl says why"
    ):
        summarise(tmp_path, Thresholds())


@pytest.mark.parametrize("text", ["0", "1.5", "=0.5", "half", "box=", "box=nan"])
def test_a_threshold_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=f"--pass-threshold {text}: expected NUMBER or TASK=NUMBER"):
        Thresholds.parsed([text])


def test_thresholds_are_of_all_tasks_or_of_one() -> None:
    thresholds = Thresholds.parsed(["0.7", "a=b=0.5"])
    assert (thresholds.of("x"), thresholds.of("a=b")) == (0.7, 0.5)
    thresholds.check(["a=b", "c"])
    with pytest.raises(ValueError, match=r"--pass-threshold a=b=...: the dataset has no such task; it has c"):
        thresholds.check(["c"])


def test_evaluations_are_paired_by_prompt_and_the_rest_is_said(tmp_path: Path) -> None:
    earlier = evaluation(tmp_path / "a", {"word": [[0.0]] * 12 + [[1.0]] * 3})
    later = evaluation(tmp_path / "b", {"word": [[0.0]] * 2 + [[1.0]] * 13}, first=1)
    compared = compare(earlier, later)
    found = compared.comparison.by_task["word"]
    assert (found.n, compared.only_earlier, compared.only_later, compared.changed) == (14, 1, 1, 0)
    # Prompts 1..14: of the earlier one the last three are right, of the later one all but 1 and 2.
    assert (found.earlier, found.later) == (pytest.approx(3 / 14), pytest.approx(12 / 14))
    assert found.difference.mean == pytest.approx(9 / 14)
    # Nine differences of one sign, 2 of 2^9 ways to choose the signs are as far out; exact or from 9,999 draws.
    assert found.p_value == pytest.approx(2 / 2**9, abs=0.003)
    text = shown(comparison_table(compared))
    assert "not compared: 1 samples that only the earlier one answered, 1 that only this one did, 0 of" in text
    assert "0.214 0.857 +0.643 [" in " ".join(text.split())
    write_comparison(later, compared)
    tree = json.loads((later / "comparison.json").read_text())
    assert tree["accuracy"]["tasks"]["word"]["n"] == 14


def test_samples_of_one_name_that_are_other_questions_are_not_compared(tmp_path: Path) -> None:
    earlier = evaluation(tmp_path / "a", {"word": [[1.0], [1.0]], "box": [[1.0]]})
    later = evaluation(tmp_path / "b", {"word": [[0.0], [0.0]]}, question="another?")
    with pytest.raises(EvaluationError, match=r"no sample in common \(2 of the same name are other questions\)"):
        compare(earlier, later)
    evaluation(later, {"box": [[0.5]]})
    compared = compare(earlier, later)
    assert (compared.changed, compared.comparison.over_tasks.n) == (2, 1)
    assert compared.comparison.over_tasks.difference.mean == -0.5


def test_a_comparison_says_what_else_differs(tmp_path: Path) -> None:
    earlier = evaluation(tmp_path / "a", {"word": [[1.0]]})
    later = evaluation(tmp_path / "b", {"word": [[1.0] * 8]}, samples=8)
    assert compare(earlier, later).differences == ["sampling.samples: 1 there, 8 here"]
