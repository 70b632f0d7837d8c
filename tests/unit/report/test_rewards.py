# SPDX-License-Identifier: Apache-2.0
"""Claim: a report compares the first validation with the last one, and says what it lacks where it cannot."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from matplotlib import pyplot as plt

from megatron_g2rpo.report.metrics import ReportError, read_metrics
from megatron_g2rpo.report.rewards import Change, changes, draw, text_only_accuracy

METRICS = ("reward", "greedy_reward", "accuracy", "greedy_accuracy")


def write_run(run: Path, *validations: float) -> Path:
    """A run of one task, ``ocr``, with a validation of the given value at every second step."""
    run.mkdir(exist_ok=True)
    (run / "recipe.yaml").write_text(f"data: {{validation: {{path: {run}/data/val}}}}\n")
    lines = []
    for number, value in enumerate(validations):
        named = {f"val/{task}{name}": value for name in METRICS for task in ("ocr/", "mean_")}
        lines += [{"step": 2 * number, **named}, {"step": 2 * number + 1, "train/reward": value}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_first_and_last_validation_are_compared(tmp_path: Path) -> None:
    found = changes(read_metrics(write_run(tmp_path, 0.1, 0.9, 0.4)), "reward")
    assert found == [Change("ocr", 0.1, 0.4), Change("mean over tasks", 0.1, 0.4)]


def test_a_task_s_name_may_have_slashes_and_dots(tmp_path: Path) -> None:
    names = {"hiyouga/geometry3k": 0.2, "mathvista_v1.0": 0.4, "reward": 0.6}
    line = {f"val/{task}/{prefix}reward": value for task, value in names.items() for prefix in ("", "greedy_")}
    lines = [{"step": step, "val/mean_reward": 0.3, **line} for step in (0, 1)]
    assert [change.task for change in changes(lines, "reward")] == [*names, "mean over tasks"]


def write_lines(run: Path, *lines: dict[str, float]) -> Path:
    """A run of these lines of metrics, the first of step 0."""
    (run / "recipe.yaml").write_text("data: {validation: null}\n")
    (run / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": step, **line}) + "\n" for step, line in enumerate(lines))
    )
    return run


def validation(metrics: Sequence[str] = METRICS, **values: float) -> dict[str, float]:
    """A validation's line: every metric of each task at its value, and the means over these tasks."""
    named = {f"val/{task}/{name}": value for name in metrics for task, value in values.items()}
    return {**named, **{f"val/mean_{name}": sum(values.values()) / len(values) for name in metrics}}


def test_a_task_that_one_validation_lacks_is_shown_and_left_out_of_the_mean(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Validation data that changed, or a task all of whose rewards failed: the last has ``math``, the first ``ocr``."""
    first, last = validation(ocr=0.2, chart=0.4), validation(chart=0.5, math=0.9)
    run = write_lines(tmp_path, first, {"train/reward": 0.3, "train/other/reward": 0.3}, last)
    expected = [Change("ocr", 0.2, None), Change("chart", 0.4, 0.5), Change("math", None, 0.9)]
    assert changes(read_metrics(run), "reward") == [*expected, Change("mean over tasks", 0.4, 0.5)]
    draw(run)
    shown = capsys.readouterr().out
    assert "0.200 ->   -  " in shown
    assert "  -   -> 0.900" in shown
    assert "math: lacks a value in the first or the last validation" in shown


def test_validations_without_a_task_in_common_have_no_mean(tmp_path: Path) -> None:
    run = write_lines(tmp_path, validation(ocr=0.2), validation(math=0.9))
    assert changes(read_metrics(run), "reward")[-1] == Change("mean over tasks", None, None)
    assert draw(run).exists()


def test_a_metric_that_some_tasks_lack_is_blank_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Greedy answers of ``math`` have no reward at all, and the recipe weighs no accuracy."""
    line = {**validation(("reward",), ocr=0.2, math=0.3), **validation(("greedy_reward",), ocr=0.4)}
    draw(write_lines(tmp_path, line, {"train/reward": 0.3}, line))
    rows = [row.split() for row in capsys.readouterr().out.splitlines()]
    assert rows[2] == ["ocr", "0.200", "->", "0.200", "0.400", "->", "0.400"]
    assert rows[3] == ["math", "0.300", "->", "0.300"]
    assert "accuracy" not in rows[1]


def test_a_run_on_several_validation_sets_has_no_card(tmp_path: Path) -> None:
    write_run(tmp_path, 0.1, 0.2)
    for path in ("null", "{path: [a, b]}"):
        (tmp_path / "recipe.yaml").write_text(f"data: {{validation: {path}}}\n")
        assert text_only_accuracy(tmp_path) == {}


@pytest.mark.parametrize("values", [(0.8, 0.3), (0.3, 0.8), (0.0, 0.0)], ids=["fell", "rose", "nothing"])
def test_every_bar_fits_the_picture(
    tmp_path: Path, values: tuple[float, float], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = []
    monkeypatch.setattr(plt, "close", figures.append)
    target = draw(write_run(tmp_path, *values))
    assert target == tmp_path / "report" / "rewards.png"
    assert target.stat().st_size > 10_000
    assert f"{values[0]:.3f} -> {values[1]:.3f}" in capsys.readouterr().out
    bottom, top = figures[0].axes[0].get_ylim()
    assert bottom == 0
    assert top > max(values)


def test_what_a_text_only_reader_reaches_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, 0.1, 0.2)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "card.json").write_text('{"text_only_accuracy": {"ocr": 0.25}}')
    draw(tmp_path)
    assert "ocr: accuracy 0.250 without looking at the image" in capsys.readouterr().out


def test_nothing_to_compare(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match="does not exist"):
        draw(tmp_path / "nowhere")
    with pytest.raises(ReportError, match="fewer than two validations"):
        draw(write_run(tmp_path, 0.1))
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ReportError, match="is empty"):
        draw(tmp_path)


def test_an_installation_without_matplotlib_says_how_to_get_it_and_prints_nothing_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # as if it were not installed
    with pytest.raises(ReportError, match=r"matplotlib.*pip install 'megatron-g2rpo\[report\]'"):
        draw(write_run(tmp_path, 0.1, 0.2))
    assert capsys.readouterr().out == ""


def test_a_damaged_line_is_named_and_one_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    path = write_run(tmp_path, 0.1, 0.2) / "metrics.jsonl"
    lines = read_metrics(tmp_path)
    with path.open("ab") as file:
        file.write(b'{"step": 9, "tr')
    assert read_metrics(tmp_path) == lines
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(ReportError, match=rf"^{path}, line {len(lines) + 1}: .*remove the line"):
        read_metrics(tmp_path)
