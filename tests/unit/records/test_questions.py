# SPDX-License-Identifier: Apache-2.0
"""Claim: the questions that docs/records.md answers in SQL and pandas have these answers, and both ways the same."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pytest

from megatron_g2rpo.records.writing import RolloutWriter, table_of
from tests.unit.records.rows import PARTS, SAMPLES, TASKS, header, known_row, row

DOCS = Path(__file__).parents[3] / "docs" / "records.md"
SQL = re.findall(r"^```sql\n(.*?)^```", DOCS.read_text(), re.MULTILINE | re.DOTALL)
PANDAS = re.findall(r"^```python\n(.*?)^```", DOCS.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Four steps, as the page has them: runs/quickstart, in the working directory.

    `chart` loses accuracy in the second half, `math` gains format; engine and trainer differ most in `ocr`.
    """
    directory = tmp_path / "runs" / "quickstart"
    writer = RolloutWriter(directory, period=1, budget_mb=10, last_step=4, note=print)
    for step in (1, 2, 3, 4):
        late = step > 2
        rows, known = [], []
        for group, task in enumerate(TASKS):
            for sample in range(SAMPLES):
                accuracy = float(sample % 2) * (0.25 if late and task == "chart" else 0.5)
                form = 1.0 if late or task != "math" else 0.0
                parts = {"reward_accuracy": accuracy, "reward_format": form}
                rows.append(row(step, group, sample, **parts, reward=0.9 * accuracy + 0.1 * form))
                gap = {"ocr": 0.5, "math": 0.25}.get(task, 0.125)
                logprobs = [-0.1 * (sample + 1) + gap] * (3 + sample)
                known.append(known_row(group, sample, old_logprobs=logprobs))
        writer.begin(table_of(rows, PARTS), header(step))
        writer.finish(table_of(known, PARTS, ("advantage", "old_logprobs", "entropies")), PARTS)
    monkeypatch.chdir(tmp_path)
    return directory


def asked(sql: str) -> list[tuple[Any, ...]]:
    """What the real duckdb answers."""
    return duckdb.connect().execute(sql).fetchall()


def computed(code: str) -> list[tuple[Any, ...]]:
    """The rows of ``answer``, which a block of the page computes; several blocks share their first."""
    names: dict[str, Any] = {}
    exec(PANDAS[0], names)
    exec(code, names)
    answer = names["answer"]
    assert isinstance(answer, pd.DataFrame)
    return [tuple(line) for line in answer.itertuples(index=False)]


def assert_same(one: list[tuple[Any, ...]], other: list[tuple[Any, ...]]) -> None:
    # Sums of a few float64 (of float32, for log-probabilities) in another order.
    assert len(one) == len(other)
    for left, right in zip(one, other, strict=True):
        assert list(left) == [pytest.approx(each, rel=1e-6) if isinstance(each, float) else each for each in right]


def test_the_page_answers_four_questions_both_ways() -> None:
    assert len(SQL) == 4
    assert len(PANDAS) == 5  # the first one reads


def test_which_task_got_worse(run: Path) -> None:
    answer = asked(SQL[0])
    assert_same(answer, computed(PANDAS[1]))
    tasks = [line[0] for line in answer]
    assert tasks[0] == "chart"
    assert answer[0][1:] == pytest.approx((0.9 * 0.25 + 0.1, 0.9 * 0.125 + 0.1, -0.9 * 0.125), rel=1e-12)
    assert tasks[-1] == "math", "which gained"


def test_which_answers_lost_reward(run: Path) -> None:
    answer = asked(SQL[1])
    assert_same(answer, computed(PANDAS[2]))
    # Step 3 against the mean of step 2: even samples have the format alone. Step 4 is compared with step 3.
    assert [line[:3] for line in answer] == [
        (3, "chart-000000/0", 0),
        (3, "chart-000000/0", 2),
        (3, "chart-000000/1", 0),
    ]
    assert [line[4] for line in answer] == pytest.approx([-0.9 * 0.25] * 3, rel=1e-9)
    assert answer[0][5] == "<answer>0</answer>"


def test_prompts_that_were_drawn_once_have_no_change(run: Path) -> None:
    """The lowest rewards come first then."""
    for step in (1, 2, 3):
        (run / "rollouts" / f"step_{step:06d}.parquet").unlink()
    answer = asked(SQL[1])
    assert_same([(*line[:4], line[5]) for line in answer], [(*line[:4], line[5]) for line in computed(PANDAS[2])])
    assert [line[4] for line in answer] == [None] * 3
    assert [line[3] for line in answer] == pytest.approx([0.1] * 3, rel=1e-9)


def test_format_or_accuracy(run: Path) -> None:
    answer = asked(SQL[2])
    assert_same(answer, computed(PANDAS[3]))
    by_step = {line[0]: line[1:] for line in answer}
    assert sorted(by_step) == [2, 3]
    # Four of six groups lose an eighth of accuracy, one gains all of format.
    assert by_step[3][0] - by_step[2][0] == pytest.approx(-0.125 * 4 / 6, rel=1e-9)
    assert by_step[3][1] - by_step[2][1] == pytest.approx(1 / 6, rel=1e-9)


def test_where_engine_and_trainer_differ(run: Path) -> None:
    answer = asked(SQL[3])
    assert_same(answer, computed(PANDAS[4]))
    assert [line[0] for line in answer] == ["ocr", "math", "chart"]
    # float32 log-probabilities around 0.5
    assert [line[1] for line in answer] == pytest.approx([0.5, 0.25, 0.125], rel=1e-5)
