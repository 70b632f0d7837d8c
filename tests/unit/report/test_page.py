# SPDX-License-Identifier: Apache-2.0
"""Claim: the page holds what the run recorded, within its budget, and nothing that a model wrote can act in it."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from megatron_g2rpo.report import page as pages
from megatron_g2rpo.report import samples
from megatron_g2rpo.report.metrics import ReportError
from megatron_g2rpo.report.page import write_page
from tests.common.recorded_run import PARTS, TASKS, WEIGHTS, write_recorded_run

HOSTILE = (
    "</script><script>window.hacked = 1</script>",
    "<!-- <script> <img src=x onerror='window.hacked = 1'>",
    "{policy} {plotly} {blocks} ${x} \\u003c",
    "\u202egnol\u2066 \u0000\u001b[31m",
    "y" * 100_000,
)


class Parsed(HTMLParser):
    """What a browser's parser finds: the elements, and the content of each script."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: Counter[str] = Counter()
        self.scripts: list[tuple[dict[str, str | None], list[str]]] = []
        self.policy = ""
        self._inside = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements[tag] += 1
        held = dict(attrs)
        assert not [name for name in held if name.startswith("on")], held
        if held.get("http-equiv") == "Content-Security-Policy":
            self.policy = held["content"] or ""
        self._inside = tag == "script"
        if self._inside:
            self.scripts.append((held, []))

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.scripts[-1][1].append(data)

    def block(self, name: str) -> Any:
        return next(json.loads("".join(text)) for held, text in self.scripts if held.get("id") == name)


def unpacked(text: str) -> Any:
    return json.loads(gzip.decompress(base64.b64decode(text)))


def rows_of(parsed: Parsed, number: int = 0) -> list[dict[str, Any]]:
    """All rollouts that a page carries, each with its group."""
    held = parsed.block(f"samples-{number}")
    groups = [unpacked(chunk) for chunk in held["chunks"]]
    index = unpacked(held["index"])
    found = []
    for place in range(len(index["step"])):
        values = {name: column[place] for name, column in index.items()}
        group = groups[values["chunk"]][values["group"]]
        found.append(
            {**values, "task": held["tasks"][values["task"]], "of": group, "said": group["rows"][values["place"]]}
        )
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recorded_run(tmp_path_factory.mktemp("page") / "run", steps=12, texts=HOSTILE)


@pytest.fixture(scope="module")
def parsed(run: Path) -> Parsed:
    return Parsed(write_page([run]).read_text("utf-8"))


def test_it_is_one_file_that_names_no_other(run: Path, parsed: Parsed) -> None:
    page = run / "report" / "report.html"
    assert [path.name for path in page.parent.iterdir()] == ["report.html"]
    assert not any(held.get("src") for held, _ in parsed.scripts)
    assert parsed.elements["iframe"] == parsed.elements["object"] == parsed.elements["base"] == 0
    outside = re.sub(r"<script>.*?</script>", "", page.read_text("utf-8"), flags=re.DOTALL)
    assert not re.findall(r"https?://", outside)


def test_the_policy_allows_the_two_scripts_and_nothing_else(parsed: Parsed) -> None:
    code = ["".join(text) for held, text in parsed.scripts if held.get("type") != "application/json"]
    assert len(code) == 2
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in code]
    sources = " ".join(f"'sha256-{digest}'" for digest in digests)
    assert f"script-src {sources};" in parsed.policy
    assert parsed.policy.startswith("default-src 'none'; ")
    assert "connect-src" not in parsed.policy
    assert "unsafe-eval" not in parsed.policy


def test_a_served_page_may_ask_its_server_alone(run: Path) -> None:
    page = pages.page_of([pages.read_run(run)], version_url="/version")
    assert "connect-src 'self'" in Parsed(page).policy


def test_texts_of_models_make_no_element(parsed: Parsed) -> None:
    """The elements of the page are those of its template, however many answers there are and whatever they say."""
    assert parsed.elements["img"] == 0
    assert parsed.elements["script"] == 2 + 3  # the code; page, samples and pictures
    shown = [row["said"]["text"] for row in rows_of(parsed) if row["step"] == 12]
    assert [text in shown for text in HOSTILE[:4]] == [True] * 4


def test_a_run_s_and_a_task_s_name_make_no_element(tmp_path: Path) -> None:
    run = write_recorded_run(tmp_path / "<img src=x>", steps=2)
    metrics = run / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    named = [{**line, "train/<b onclick=x>/reward": 1.0, "val/<i>/greedy_reward": 1.0} for line in lines]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in named))
    found = Parsed(write_page([run]).read_text("utf-8"))
    assert found.elements["img"] == found.elements["b"] == found.elements["i"] == 0
    assert "<b onclick=x>" in found.block("page")["tasks"]


def test_a_long_text_is_cut_and_says_so(parsed: Parsed) -> None:
    texts = [row["said"]["text"] for row in rows_of(parsed) if row["said"]["text"].startswith("yyy")]
    assert len(texts) == 1
    assert len(texts[0]) < samples.LONGEST_TEXT + 100
    assert texts[0].endswith("[... 80,000 more characters are in the run's records]")
    assert any("are cut, and say so: 1 of them" in note for note in parsed.block("samples-0")["notes"])


def test_every_rollout_is_there_with_its_values(run: Path, parsed: Parsed) -> None:
    rows = rows_of(parsed)
    assert len(rows) == 12 * len(TASKS) * 2 * 4
    for row in rows:
        parts = row["said"]["parts"]
        assert set(parts) == set(PARTS)
        # Five digits of each value.
        assert row["reward"] == pytest.approx(sum(WEIGHTS[name] * value for name, value in parts.items()), abs=1e-4)
        assert row["tokens"] == len(row["said"]["ids"]) == len(row["said"]["old"]) == len(row["said"]["entropy"])
        assert row["of"]["task"] == row["task"]
        assert row["of"]["step"] == row["step"]


def test_tokens_have_their_texts(parsed: Parsed) -> None:
    vocabulary = parsed.block("samples-0")["vocabulary"]
    for row in rows_of(parsed):
        if row["step"] < 12:  # whose texts are no others
            assert "".join(vocabulary[str(each)] for each in row["said"]["ids"]).strip() == row["said"]["text"]


def test_pictures_are_there_and_boxes_lie_in_them(parsed: Parsed) -> None:
    uris = parsed.block("pictures-0")
    assert uris
    assert all(re.match(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/=]+$", uri) for uri in uris)
    boxed = [row for row in rows_of(parsed) if row["task"] == "grounding"]
    for row in boxed:
        assert row["of"]["images"][0]["picture"] in range(len(uris))
        assert row["of"]["boxes"] == [[8 / 64, 8 / 64, 40 / 64, 40 / 64]]
    place = 3
    answered = next(row for row in boxed if row["said"]["sample"] == place and row["said"]["answer"] is not None)
    assert answered["said"]["boxes"] == [[(8 + place) / 64, 8 / 64, (40 + place) / 64, 40 / 64]]
    assert not any(row["said"]["boxes"] or row["of"]["boxes"] for row in rows_of(parsed) if row["task"] != "grounding")


def test_a_missing_image_and_a_missing_tokenizer_are_said(tmp_path: Path) -> None:
    run = write_recorded_run(tmp_path / "run", steps=2, with_data=False)
    (tmp_path / "model" / "tokenizer.json").unlink()
    found = Parsed(write_page([run]).read_text("utf-8"))
    images = [image for row in rows_of(found) for image in row["of"]["images"]]
    assert images
    assert all("picture" not in image and "data" in image["fault"] for image in images)
    assert found.block("samples-0")["vocabulary"] == {}
    assert any("tokenizer.json" in note for note in found.block("samples-0")["notes"])


def test_a_budget_is_kept_and_cuts_all_tasks_alike(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = len(write_page([run]).read_bytes())
    room = 20_000
    monkeypatch.setattr(pages, "LEAST_OF_SAMPLES", room)
    monkeypatch.setattr(pages, "LARGEST_PAGE", whole - 10 * room)
    found = Parsed(pages.page_of([pages.read_run(run)]))
    held = found.block("samples-0")
    rows = rows_of(found)
    assert 0 < held["shown"] == len(rows) < held["recorded"]
    assert f"{held['shown']:,} of {held['recorded']:,} recorded rollouts" in held["notes"][0]
    assert len(json.dumps(held)) + len(json.dumps(found.block("pictures-0"))) < 1.1 * room
    groups = Counter(row["task"] for row in rows if row["place"] == 0)
    assert set(groups) == set(TASKS)
    assert max(groups.values()) - min(groups.values()) <= 1
    # Whole groups, from the first to the last step.
    assert all(len(row["of"]["rows"]) == 4 for row in rows)
    assert {row["step"] for row in rows} >= {1, 12}


def test_two_runs_are_laid_over_another_with_what_their_recipes_differ_in(tmp_path: Path) -> None:
    first = write_recorded_run(tmp_path / "first", steps=4)
    second = write_recorded_run(tmp_path / "second", steps=4, seed=1, recipe={"ratio_clip_max": 0.4})
    own = write_page([first])
    own_text = own.read_text("utf-8")
    both = write_page([first, second])
    assert (both.parent, both.name) == (own.parent, "report-and-second.html")
    assert own.read_text("utf-8") == own_text
    found = Parsed(both.read_text("utf-8"))
    held = found.block("page")
    assert held["runs"] == ["first", "second"]
    assert held["differences"] == [["loss_fn.ratio_clip_max", "-", "0.4"]]
    names = {trace["name"] for section in held["sections"] for chart in section["charts"] for trace in chart["traces"]}
    assert {"gradient norm · first", "gradient norm · second"} <= names
    assert len(rows_of(found, 0)) == len(rows_of(found, 1)) == 4 * len(TASKS) * 2 * 4
    assert not (second / "report").exists()


def test_what_cannot_be_shown_is_refused(tmp_path: Path) -> None:
    run = write_recorded_run(tmp_path / "run", steps=2)
    with pytest.raises(ReportError, match="named twice"):
        write_page([run, tmp_path / "." / "run"])
    with pytest.raises(ReportError, match="not 3"):
        write_page([run, run, run])
    with pytest.raises(ReportError, match="is not the directory of a run"):
        write_page([tmp_path])
    assert not (tmp_path / "report").exists()
    damaged = run / "rollouts" / "step_000002.parquet"
    damaged.write_bytes(damaged.read_bytes()[:-10])
    with pytest.raises(ReportError, match=r"step_000002\.parquet"):
        write_page([run])
    assert not list(run.glob("report/*"))


def test_a_run_without_records_has_its_charts(tmp_path: Path) -> None:
    run = write_recorded_run(tmp_path / "run", steps=3)
    for path in (run / "rollouts").iterdir():
        path.unlink()
    (run / "recipe.yaml").unlink()
    held = Parsed(write_page([run]).read_text("utf-8")).block("page")
    assert held["samples"] == []
    assert held["tasks"] == list(TASKS)
    missing = {each["title"] for section in held["sections"] for each in section["missing"]}
    assert {f"Advantages against N(0, 1): {task}" for task in TASKS} <= missing


def test_what_a_killed_process_left_is_removed_and_what_another_one_writes_is_not(run: Path) -> None:
    pages = write_page([run]).parent
    abandoned, underway = pages / ".report.html.1", pages / ".report.html.2"
    for path in (abandoned, underway):
        path.write_text("half a page")
    now = underway.stat().st_mtime
    os.utime(abandoned, (now - 3600, now - 3600))
    write_page([run])
    assert sorted(path.name for path in pages.iterdir()) == [".report.html.2", "report.html"]
    underway.unlink()


def test_a_value_that_is_not_finite_is_a_gap(tmp_path: Path) -> None:
    run = write_recorded_run(tmp_path / "run", steps=3)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "train/reward": NaN, "train/grad_norm": Infinity}\n')
    held = Parsed(write_page([run]).read_text("utf-8")).block("page")
    assert unpacked(held["series"])[0]["train/grad_norm"]["values"][-1] is None
