# SPDX-License-Identifier: Apache-2.0
"""The page: one HTML file that needs neither a network nor a server.

What a model wrote is data. It lies in JSON blocks in which no ``<`` occurs, the page's script sets it as text alone,
and the Content-Security-Policy lets nothing run but the two scripts whose SHA-256 it names: plotly and the page's own.
"""

from __future__ import annotations

import base64
import contextlib
import glob
import hashlib
import html
import json
import os
from collections.abc import Sequence
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from megatron_g2rpo.report.charts import Measured, charts_of
from megatron_g2rpo.report.charts.base import rounded
from megatron_g2rpo.report.metrics import ReportError, read_metrics
from megatron_g2rpo.report.recipes import differences
from megatron_g2rpo.report.rewards import Change, all_changes, rows_of, text_only_accuracy
from megatron_g2rpo.report.rollouts import read_overview
from megatron_g2rpo.report.run_directory import REPORT_DIR, RunDirectory, read_run
from megatron_g2rpo.report.samples import Samples, packed, samples_of

PAGE = "report.html"
LARGEST_PAGE = 9_500_000  # bytes
LEAST_OF_SAMPLES = 200_000  # bytes, where charts of a long run leave no more
PLOTLY = "plotly/plotly-basic.min.js"  # another project's: see its README
SCRIPTS = ("common.js", "charts.js", "changes.js", "samples.js", "explorer.js")
MOST_RUNS = 2
ABANDONED_S = 600.0  # seconds after which a page that is not whole is that of a process that was killed


def write_page(paths: Sequence[Path], *, version_url: str | None = None) -> Path:
    """Write the page of a run, or of two runs, into ``report/`` of the first.

    The page of two has a name of its own, ``report-and-OTHER.html``: that of the first run stays.

    Args:
        paths: the run directories, one or two.
        version_url: where the page asks whether there is a newer one; None: it asks nowhere.

    Returns:
        The path of the page. A page that was there is replaced at once, when the new one is whole.

    Raises:
        ReportError: a run has nothing to report, or a file of it is damaged; there are more than two runs, or one
            twice.
    """
    if not 1 <= len(paths) <= MOST_RUNS:
        raise ReportError(f"a report shows one run, or two beside each other, not {len(paths)}")
    if len({path.resolve() for path in paths}) < len(paths):
        raise ReportError(f"{paths[0]} is named twice: name another run to compare it with")
    text = page_of([read_run(path) for path in paths], version_url=version_url)
    target = paths[0] / REPORT_DIR / (PAGE if len(paths) == 1 else f"report-and-{paths[1].resolve().name}.html")
    target.parent.mkdir(exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        partial.write_text(text, "utf-8")
        _remove_abandoned(target.name, partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def _remove_abandoned(name: str, partial: Path) -> None:
    """Remove what killed processes left of a page, of this machine and others: a page is on the disk in seconds."""
    # Both times are the file system's own, whatever the clock of this machine says.
    oldest = partial.stat().st_mtime - ABANDONED_S
    for path in partial.parent.glob(f".{glob.escape(name)}.*"):
        with contextlib.suppress(FileNotFoundError):  # its process, or another one like this, was quicker
            if path.stat().st_mtime < oldest:
                path.unlink()


def page_of(runs: Sequence[RunDirectory], *, version_url: str | None = None) -> str:
    """Return the page of one or two runs; see ``write_page``."""
    measured = [Measured(run=run, overview=read_overview(run.path)) for run in runs]
    plotly, script = _parsed_at_once(_asset(PLOTLY)), "\n".join(_asset(name) for name in SCRIPTS)
    page = _page_data(measured)
    room = LARGEST_PAGE - len(plotly.encode()) - len(script) - len(json.dumps(page))
    recorded = [each for each in measured if each.overview is not None]
    budget = max(LEAST_OF_SAMPLES, room) / max(1, len(recorded))
    samples = {each.run.name: samples_of(each.run, each.overview, budget) for each in recorded if each.overview}
    page["samples"] = [{"run": name} for name in samples]
    page["version_url"] = version_url
    blocks = {"page": page}
    for number, each in enumerate(samples.values()):
        blocks |= _sample_blocks(number, each)
    return _fill(
        _asset("page.html"),
        policy=_policy((plotly, script), served=version_url is not None),
        title=html.escape(" and ".join(run.name for run in runs)),
        style=_asset("page.css"),
        summary="\n".join(_summary(run) for run in runs),
        release=html.escape(metadata.version("megatron-g2rpo")),
        blocks="\n".join(_block(name, value) for name, value in blocks.items()),
        plotly=plotly,
        script=script,
    )


def _page_data(measured: Sequence[Measured]) -> dict[str, Any]:
    """What the page's script reads at the start."""
    runs = [each.run for each in measured]
    sections = []
    for title, charts in charts_of(measured):
        shown = [chart for chart in charts if chart.has_data]
        missing = [{"title": chart.title, "needs": chart.needs} for chart in charts if not chart.has_data]
        fields = ("name", "title", "about", "traces", "layout")
        listed = [{field: getattr(chart, field) for field in fields} for chart in shown]
        sections.append({"title": title, "charts": listed, "missing": missing})
    every = [
        {name: {"steps": series.steps, "values": rounded(series.values)} for name, series in run.metrics.series.items()}
        for run in runs
    ]
    return {
        "runs": [run.name for run in runs],
        "tasks": list(dict.fromkeys(task for run in runs for task in run.tasks)),
        "weights": {task: runs[0].reward_weights(task) for task in runs[0].tasks},
        "last_step": runs[0].metrics.last_step,
        "names": list(dict.fromkeys(name for run in runs for name in run.metrics.series)),
        "series": packed(every),
        "sections": sections,
        "differences": differences(runs[0].recipe, runs[1].recipe) if len(runs) > 1 else [],
    }


def _sample_blocks(number: int, samples: Samples) -> dict[str, Any]:
    named = ("tasks", "chunks", "vocabulary", "notes", "shown", "recorded")
    held = {"index": packed(samples.index), **{name: getattr(samples, name) for name in named}}
    return {f"samples-{number}": held, f"pictures-{number}": samples.pictures}


def _summary(run: RunDirectory) -> str:
    """What a reader must know first, as HTML: the run, how far it is, and its validations before and after."""
    metrics = run.metrics
    facts = [
        f"{run.path}: {metrics.last_step} steps",  # as it was asked for: a page is sent to others
        f"model {run.setting('policy.model_name', 'not named')}",
    ]
    if estimator := run.setting("grpo.adv_estimator.name"):
        facts.append(f"estimator {estimator}")
    if metrics.bin_size > 1:
        facts.append(f"each point of a curve is the mean of {metrics.bin_size} steps")
    lines = [f'<p class="soft">{html.escape(" · ".join(facts))}</p>']
    try:
        found = all_changes(read_metrics(run.path))
    except ReportError:  # fewer than two validations: no table
        return "\n".join(lines)
    head = "".join(f'<th scope="col" class="number">held out, {name.replace("_", " ")}</th>' for name in found)
    rows = []
    order = {task: place for place, task in enumerate(run.tasks)}  # that of the charts
    for task, row in sorted(rows_of(found).items(), key=lambda each: order.get(each[0], len(order))):
        cells = "".join(_before_and_after(row.get(name)) for name in found)
        rows.append(f'<tr><th scope="row">{html.escape(task)}</th>{cells}</tr>')
    lines.append(
        '<div class="scroll" tabindex="0" role="region" aria-label="Validation, first and last">'
        f'<table><thead><tr><th scope="col">task</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )
    blind = text_only_accuracy(run.path)
    lines += [
        f'<p class="soft">{html.escape(task)}: accuracy {value:.3f} without looking at the image</p>'
        for task, value in blind.items()
    ]
    return "\n".join(lines)


def _before_and_after(change: Change | None) -> str:
    if change is None:
        return '<td class="number"></td>'
    before, after = ("–" if value is None else f"{value:.3f}" for value in (change.before, change.after))
    gain = ""
    if change.before is not None and change.after is not None:
        difference = round(change.after - change.before, 3)
        kind = "bad" if difference < 0 else "good" if difference > 0 else "soft"
        gain = f' <span class="{kind}">{f"{difference:+.3f}" if difference else "0.000"}</span>'
    return f'<td class="number">{before} → {after}{gain}</td>'


def _policy(scripts: Sequence[str], *, served: bool) -> str:
    """The Content-Security-Policy: no source but the page itself; of scripts, these alone."""
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    rules = {
        "default-src": "'none'",
        "script-src": " ".join(f"'sha256-{digest}'" for digest in digests),
        "style-src": "'unsafe-inline'",  # plotly sets styles
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        **({"connect-src": "'self'"} if served else {}),
    }
    return "; ".join(f"{name} {value}" for name, value in rules.items())


def _block(name: str, value: Any) -> str:
    """A JSON block. Without a ``<``, no text in it can end it, or begin a comment or a script."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json" id="{name}">{text}</script>'


def _fill(template: str, **values: str) -> str:
    """Put values in the places of a template, once: what looks like a place within a value stays as it is."""
    filled = []
    for piece in template.split("{"):
        name, closed, rest = piece.partition("}")
        filled.append(values[name] + rest if closed and name in values else ("{" if filled else "") + piece)
    return "".join(filled)


def _asset(name: str) -> str:
    return (resources.files("megatron_g2rpo.report") / "assets" / name).read_text("utf-8")


def _parsed_at_once(script: str) -> str:
    """Put plotly's whole body, a function, in parentheses, which tells a browser that it is called at once.

    Otherwise it is read once to find its end and once more to run: a fifth of the time until the load event
    (``benchmarks/README.md``).
    """
    begin, end = "this, () => {", "\n}));"
    assert script.count(begin) == 1, "another form of plotly.js"
    assert script.endswith(end), "another form of plotly.js"
    return script.removesuffix(end).replace(begin, "this, (() => {") + "\n})));"
