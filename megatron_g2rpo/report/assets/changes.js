// SPDX-License-Identifier: Apache-2.0
// "What changed": two spans of steps of the first run, task by task, and which part of the reward the change is of.
"use strict";

(() => {
  const { last_step: last, weights, tasks } = report.page;
  const half = Math.floor(last / 2);
  const field = (id, label, value) =>
    report.element("label", {}, label, report.element("input", { id, type: "number", min: 0, max: last, value }));
  const form = report.element(
    "form", { "aria-label": "Spans of steps to compare" },
    field("change-a", "compare from step", 1), field("change-b", "to step", Math.max(1, half)),
    field("change-c", "with from step", half + 1), field("change-d", "to step", last),
  );
  const output = report.element("div", { "aria-live": "polite" });
  report.section(
    "changes", "What changed",
    report.element(
      "p", { class: "soft" },
      "The mean training reward of two spans of steps, the task that lost most first, and what each part of the reward " +
      "(times its weight) adds to the change. ± is a 95 % interval, from the spread between steps; a change within it has no " +
      "colour: it may be chance. The button shows " +
      "the samples of the second span, those first that fell furthest below the last answers to the same prompt; where " +
      "none of the prompts was drawn before, those of the lowest reward.",
    ),
    form, output,
  );

  const values = (series, from, to) =>
    series ? series.steps.flatMap((step, place) => (step >= from && step <= to && series.values[place] !== null ? [series.values[place]] : [])) : [];
  const mean = (found) => (found.length ? found.reduce((sum, each) => sum + each, 0) / found.length : null);
  const variance = (found) => {
    const middle = mean(found);
    return found.length > 1 ? found.reduce((sum, each) => sum + (each - middle) ** 2, 0) / (found.length - 1) / found.length : null;
  };

  const rowOf = (metrics, task, [a, b, c, d]) => {
    const before = values(metrics[`train/${task}/reward`], a, b);
    const after = values(metrics[`train/${task}/reward`], c, d);
    if (!before.length || !after.length) return null;
    const parts = Object.entries(weights[task] ?? {}).flatMap(([part, weight]) => {
      const [first, second] = [[a, b], [c, d]].map((span) => mean(values(metrics[`train/${task}/${part}`], ...span)));
      return first === null || second === null || weight === 0 ? [] : [[part, weight * (second - first)]];
    });
    const spread = [variance(before), variance(after)];
    const error = spread.includes(null) ? null : 1.96 * Math.sqrt(spread[0] + spread[1]);
    return { task, before: mean(before), after: mean(after), change: mean(after) - mean(before), error, parts };
  };

  const show = async () => {
    const metrics = (await report.series())[0];
    const span = ["a", "b", "c", "d"].map((each) => Number(document.getElementById(`change-${each}`).value));
    const rows = tasks.map((task) => rowOf(metrics, task, span)).filter((row) => row !== null);
    rows.sort((one, other) => one.change - other.change);
    const names = [...new Set(rows.flatMap((row) => row.parts.map(([part]) => part)))];
    const cells = rows.map((row) => {
      const button = report.element("button", { type: "button", "aria-label": `Samples of ${row.task}` }, "Samples");
      button.addEventListener("click", () => report.showSamples?.({ task: row.task, from: span[2], to: span[3], sort: "change" }));
      button.disabled = !report.showSamples;
      const contribution = new Map(row.parts);
      const isChance = row.error !== null && Math.abs(row.change) <= row.error;
      return [
        row.task, row.before, row.after, report.signed(row.change, row.error ?? 0), row.error === null ? "–" : `± ${row.error.toFixed(3)}`,
        ...names.map((name) => (contribution.has(name) ? report.signed(contribution.get(name), isChance ? Infinity : 0) : "–")), button,
      ];
    });
    output.replaceChildren(
      cells.length
        ? report.table(["task", "before", "after", "change", "interval", ...names.map((name) => `of it: ${name}`), "see"], cells)
        : report.element("p", {}, "No task has a training reward in both spans."),
    );
  };
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", report.later(show));
  report.startChanges = show;
})();
