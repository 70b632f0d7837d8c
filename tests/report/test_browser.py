# SPDX-License-Identifier: Apache-2.0
"""Claim: in a real browser the page works: charts have data, filters filter, keys work, and no text of a model runs."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import pytest
from selenium.webdriver.common.keys import Keys

from megatron_g2rpo.report.page import write_page
from megatron_g2rpo.report.serve import VERSION_PATH, server_of
from tests.common.recorded_run import TASKS, WORSE_STEP, write_recorded_run
from tests.report.browser import DESKTOP, PHONE, Browser

SHOWN = "document.getElementById('f-count').textContent"


@pytest.fixture
def opened(browser: Browser, page: Path) -> Browser:
    browser.open(page.as_uri())
    return browser


def put(browser: Browser, field: str, value: str) -> None:
    """Give a field a value, as a user does."""
    browser.do(
        f"const field = document.getElementById('{field}'); field.value = '{value}';"
        "for (const kind of ['input', 'change']) field.dispatchEvent(new Event(kind, {bubbles: true}))"
    )


def choose(browser: Browser, field: str, value: str) -> None:
    """Give a field of the filter a value, and wait for the result."""
    before = browser.value(SHOWN)
    put(browser, field, value)
    browser.until(f"{SHOWN} !== {before!r}")


def found(browser: Browser) -> tuple[int, int]:
    """How many rollouts and groups the filter has found."""
    words = browser.value(SHOWN).replace(",", "").split()
    return int(words[0]), int(words[5])


def test_the_console_is_silent_and_nothing_was_loaded(opened: Browser) -> None:
    opened.do("report.drawAll()")
    assert opened.console() == []
    assert (
        opened.value("performance.getEntriesByType('resource').filter((each) => !each.name.startsWith('data:')).length")
        == 0
    )


def test_what_a_policy_forbids_is_noticed(opened: Browser) -> None:
    """The console does show a violation, so that its silence means something; and the policy does forbid."""
    opened.do(
        "const made = document.createElement('script'); made.textContent = 'window.hacked = 1';"
        "document.body.append(made)"
    )
    assert opened.value("window.hacked") is None
    assert any("Content Security Policy" in line for line in opened.console())


def test_each_chart_has_data_and_a_sentence(opened: Browser) -> None:
    opened.do("report.drawAll()")
    opened.until("[...document.querySelectorAll('.plot')].every((plot) => plot.querySelector('.main-svg'))")
    charts = opened.value(
        "[...document.querySelectorAll('.plot')].map((plot) => ["
        "plot.dataset.chart, plot.data.length, plot.querySelectorAll('.scatterlayer path, .barlayer path').length,"
        "plot.parentElement.querySelector('p').textContent])"
    )
    assert len(charts) > 5 * len(TASKS)
    for name, traces, paths, sentence in charts:
        assert traces > 0, name
        assert paths > 0, name
        assert sentence.endswith("."), name
        assert len(sentence) > 30, name
    assert opened.console() == []


# Of each chart that is drawn, the trace types that it asks for, and those that plotly has made of them.
TYPES = (
    "[...document.querySelectorAll('.plot.js-plotly-plot')].map((plot) => "
    "[plot.dataset.chart, ...[plot.data, plot._fullData].map((traces) => traces.map((each) => each.type))])"
)


def test_each_trace_type_is_known_to_the_page_s_plotly(opened: Browser) -> None:
    """The page's is a distribution of few types, and one that it does not know it would draw as another."""
    opened.do("report.drawAll()")
    opened.until("[...document.querySelectorAll('.plot')].every((plot) => plot.querySelector('.main-svg'))")
    charts = opened.value(TYPES)
    assert {each for _, asked, _ in charts for each in asked} == {"scatter", "bar"}
    for name, asked, made in charts:
        assert asked == made, name
    known = opened.value("Object.keys(Plotly.PlotSchema.get().traces)")
    assert set(known) == {"bar", "pie", "scatter"}  # what the README in its folder says


def test_a_trace_type_that_is_unknown_is_noticed(opened: Browser) -> None:
    opened.do("Plotly.newPlot(document.querySelector('.plot'), [{type: 'heatmap', z: [[1, 2], [3, 4]]}])")
    _, asked, made = opened.value(TYPES)[0]
    assert asked == ["heatmap"]
    assert made != asked


def test_a_chart_s_numbers_are_a_table(opened: Browser) -> None:
    opened.do("document.querySelector('#chart-gradient-norm summary').click()")
    opened.until("document.querySelectorAll('#chart-gradient-norm tbody tr').length === 80")


def test_the_filter_filters(opened: Browser) -> None:
    every, groups = found(opened)
    assert (every, groups) == (80 * len(TASKS) * 2 * 4, 80 * len(TASKS) * 2)
    choose(opened, "f-task", TASKS[0])
    assert found(opened) == (every // 3, groups // 3)
    choose(opened, "f-step-min", "61")
    choose(opened, "f-step-max", "62")
    assert found(opened) == (2 * 2 * 4, 4)
    choose(opened, "f-truncated", "1")
    truncated, _ = found(opened)
    assert 0 <= truncated < 16
    opened.do("document.querySelector('#samples form').reset()")
    opened.until(f"{SHOWN}.startsWith('1,920')")
    choose(opened, "f-reward-max", "0.1")
    poor, _ = found(opened)
    assert 0 < poor < every
    choose(opened, "f-tokens-min", "1000")
    assert found(opened) == (0, 0)
    assert "No sample fits" in opened.value("document.getElementById('f-results').textContent")


def test_sorting_and_pages(opened: Browser) -> None:
    choose(opened, "f-step-min", "2")
    title = "document.querySelector('#f-results h3').textContent"
    before = opened.value(title)
    opened.do("document.getElementById('f-next').click()")
    opened.until(f"{title} !== {before!r}")
    assert not opened.value("document.getElementById('f-previous').disabled")
    put(opened, "f-sort", "-reward")
    opened.until("document.querySelector('#f-results .response h4').textContent.includes('reward 1.00')")


def test_the_answers_of_a_group_stand_side_by_side_in_colour(opened: Browser) -> None:
    assert opened.value("document.querySelectorAll('#f-results article').length") == 5
    answers = "[...document.querySelector('#f-results article').querySelectorAll('.response')]"
    tops = opened.value(f"{answers}.map((each) => each.getBoundingClientRect().top)")
    assert len(tops) == 4
    assert tops[0] == tops[1]
    for colour in ("logprob", "gap", "entropy", "advantage"):
        put(opened, "f-colour", colour)
        opened.until("document.getElementById('f-legend').textContent !== ''")
        opened.until("document.querySelectorAll('.tokens span[title]').length > 20")
        painted = (
            "[...document.querySelectorAll('.tokens span[title]')].filter((each) => each.style.backgroundColor).length"
        )
        opened.until(f"{painted} > 10")


def test_boxes_are_drawn_in_the_picture(opened: Browser) -> None:
    choose(opened, "f-task", "grounding")
    opened.until("document.querySelector('.picture img')?.complete")
    assert opened.value("document.querySelector('.picture img').naturalWidth") == 64
    box, image = (
        opened.value(f"document.querySelector('{each}').getBoundingClientRect().toJSON()")
        for each in ("rect.reference", ".picture img")
    )
    reference = [(box["left"] - image["left"]) / image["width"], box["width"] / image["width"]]
    assert reference == pytest.approx([8 / 64, 32 / 64], abs=0.04)  # the stroke is 3 pixels wide
    assert opened.value("document.querySelectorAll('rect.answer').length") > 0


def test_hostile_texts_are_shown_as_text(opened: Browser) -> None:
    choose(opened, "f-step-min", "80")
    text = "document.getElementById('f-results').textContent"
    opened.until(f"{text}.includes('</script><script>window.hacked')")
    assert opened.value("window.hacked") is None
    assert opened.value("document.querySelectorAll('#f-results script, #f-results img[src=x]').length") == 0
    assert "⟨U+202E⟩gnol⟨U+2066⟩ ⟨U+0000⟩⟨U+001B⟩[31m" in opened.value(text)
    assert "more characters are in the run's records" in opened.value(text)
    assert opened.console() == []


def test_groups_without_signal_can_be_looked_at(opened: Browser) -> None:
    put(opened, "f-sort", "size")
    opened.until("document.querySelector('#f-results .response h4').textContent.endsWith('advantage 0.00')")


def test_a_change_has_a_colour_where_it_is_larger_than_its_interval(opened: Browser) -> None:
    opened.do(f"document.getElementById('change-b').value = {WORSE_STEP}")
    opened.do(f"document.getElementById('change-c').value = {WORSE_STEP + 1}")
    opened.do("window.was = document.querySelector('#changes table')")
    put(opened, "change-d", "80")
    opened.until("document.querySelector('#changes table') !== window.was")
    rows = opened.value(
        "[...document.querySelectorAll('#changes tbody tr')].map((row) => [row.cells[3].textContent, "
        "row.cells[4].textContent, row.cells[3].querySelector('.good, .bad') !== null])"
    )
    assert len(rows) == len(TASKS)
    for change, interval, coloured in rows:
        assert coloured == (abs(float(change.replace("−", "-"))) > float(interval.removeprefix("± ")))
    assert any(row[2] for row in rows), rows


def test_a_surrogate_that_stands_alone_breaks_nothing(opened: Browser) -> None:
    """Parquet holds none, but a name in the page's data may: JSON escapes it, and the browser shows a placeholder."""
    opened.do("document.body.append(report.element('p', {id: 'alone'}, 'a\\ud800b'))")
    assert opened.value("document.getElementById('alone').textContent.length") == 3


def test_what_changed_names_the_task_and_the_part(opened: Browser) -> None:
    """The two questions: which task got worse after step 60, and was the jump at step 40 format or accuracy?"""
    row = "[...document.querySelectorAll('#changes tbody tr:first-child td')].map((each) => each.textContent)"

    def spans(*steps: int) -> list[str]:
        for field, step in zip("abcd", steps, strict=True):
            opened.do(f"document.getElementById('change-{field}').value = {step}")
        opened.do("window.was = document.querySelector('#changes table')")
        put(opened, "change-d", str(steps[-1]))
        opened.until("document.querySelector('#changes table') !== window.was")
        return opened.value(row)

    worst = spans(WORSE_STEP - 19, WORSE_STEP, WORSE_STEP + 1, 80)
    assert worst[0] == "grounding"
    assert worst[3].startswith("−0.")
    jump = spans(20, 39, 40, 59)
    headings = opened.value("[...document.querySelectorAll('#changes th')].map((each) => each.textContent)")
    formed, right = (float(jump[headings.index(f"of it: {part}")].replace("−", "-")) for part in ("format", "accuracy"))
    assert formed > 0.1
    assert abs(right) < formed
    spans(WORSE_STEP - 19, WORSE_STEP, WORSE_STEP + 1, 80)
    opened.do("document.querySelector('#changes tbody button').click()")
    opened.until("document.getElementById('f-task').value === 'grounding'")
    opened.until(f"{SHOWN}.startsWith('160 ')")
    opened.until("document.querySelector('#f-results h3').textContent.startsWith('grounding')")
    assert "since last time −" in opened.value("document.querySelector('#f-results .response').textContent")


def test_samples_of_prompts_that_were_drawn_once_come_by_reward(browser: Browser, tmp_path: Path) -> None:
    run = write_recorded_run(tmp_path / "run", steps=4, with_data=False)  # 2 of the 8 prompts a step
    browser.open(write_page([run]).as_uri())
    browser.until("document.querySelector('#changes tbody button') !== null")
    browser.do("document.querySelector('#changes tbody button').click()")
    browser.until("document.getElementById('f-sort').value === 'reward'")
    browser.until(f"{SHOWN}.startsWith('16 of ')")  # steps 3 and 4, none left out
    assert "without a value" not in browser.value(SHOWN)
    titles = browser.value("[...document.querySelectorAll('#f-results .response')].map((each) => each.textContent)")
    rewards = [float(re.search(r"reward (\S+)", each)[1].replace("−", "-")) for each in titles]
    lowest = [min(rewards[at : at + 4]) for at in range(0, len(rewards), 4)]  # of each group
    assert len(lowest) == 4
    assert lowest == sorted(lowest)


def test_any_metric_can_be_seen(opened: Browser) -> None:
    put(opened, "explorer", "train/kl")
    opened.until("document.querySelector('[data-chart=explorer]').data?.[0].y.length === 80")


def test_the_keyboard_reaches_everything(opened: Browser) -> None:
    opened.do("window.scrollTo(0, 0); document.activeElement.blur()")
    opened.type(Keys.TAB)
    assert opened.value("document.activeElement.className") == "skip"
    opened.do("document.activeElement.blur()")
    opened.type("j")
    first = opened.value("document.activeElement.dataset.key")
    assert first
    opened.type("j")
    assert opened.value("document.activeElement.tagName") == "ARTICLE"
    second = opened.value("[...document.querySelectorAll('#f-results article')].indexOf(document.activeElement)")
    assert second == 1
    opened.type("k")
    assert opened.value("document.activeElement.dataset.key") == first
    opened.type("n")
    opened.until("!document.getElementById('f-previous').disabled")
    opened.do("document.getElementById('f-reward-min').focus()")
    opened.type("j")  # of a field, a letter is no command
    assert opened.value("document.activeElement.id") == "f-reward-min"
    controls = "[...document.querySelectorAll('button, select, input, summary, a')]"
    unreachable = opened.value(f"{controls}.filter((each) => each.tabIndex < 0).length")
    assert unreachable == 0


@pytest.mark.parametrize("size", [PHONE, (320, 640), DESKTOP], ids=["phone", "narrow", "desktop"])
def test_nothing_is_wider_than_the_window(browser: Browser, page: Path, size: tuple[int, int]) -> None:
    browser.open(page.as_uri(), size)
    browser.do("report.drawAll()")
    assert browser.value("document.documentElement.scrollWidth <= window.innerWidth")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_light_and_dark(browser: Browser, page: Path, dark: bool) -> None:
    browser.open(page.as_uri(), dark=dark)
    browser.do("report.drawAll()")

    def brightness(element: str, colour: str) -> float:
        text = browser.value(f"getComputedStyle(document.querySelector('{element}')).{colour}")
        return sum(float(each) for each in text.removeprefix("rgb(").removesuffix(")").split(",")[:3]) / 765

    assert (brightness("body", "backgroundColor") < 0.3) == dark
    assert abs(brightness("body", "color") - brightness("body", "backgroundColor")) > 0.5
    browser.until("document.querySelector('.xtick text') !== null")
    assert (brightness(".xtick text", "fill") > 0.5) == dark
    browser.do("document.getElementById('theme').click()")  # light, whatever the system has
    assert brightness("body", "backgroundColor") > 0.9
    browser.until("getComputedStyle(document.querySelector('.xtick text')).fill.startsWith('rgb(29')")


def test_two_runs(browser: Browser, run: Path, tmp_path: Path) -> None:
    other = write_recorded_run(tmp_path / "other", steps=20, seed=3, recipe={"ratio_clip_max": 0.4})
    browser.open(write_page([other, run]).as_uri())
    assert "ratio_clip_max" in browser.value("document.getElementById('recipes').textContent")
    choose(browser, "f-run", "1")
    assert found(browser)[0] == 80 * len(TASKS) * 2 * 4
    assert browser.console() == []


def test_a_served_page_offers_a_newer_one(browser: Browser, tmp_path: Path) -> None:
    run = write_recorded_run(tmp_path / "run", steps=3)
    written = write_page([run], version_url=VERSION_PATH)
    server = server_of(written)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        browser.open(f"http://127.0.0.1:{server.server_address[1]}/")
        assert browser.value("document.getElementById('newer').hidden")
        browser.do("window.asked = performance.getEntriesByType('resource').length")
        browser.until("performance.getEntriesByType('resource').length > window.asked")
        write_page([run], version_url=VERSION_PATH)
        browser.until("!document.getElementById('newer').hidden")
        assert browser.console() == []
    finally:
        server.shutdown()
        server.server_close()
