// SPDX-License-Identifier: Apache-2.0
// Any metric of the runs, what differs between their recipes, and the start of the page.
"use strict";

(() => {
  const { names, runs, differences } = report.page;
  const COLOURS = ["#3b82c4", "#e07b39"];
  const pick = report.element("select", { id: "explorer" }, ...names.map((name) => report.element("option", { value: name }, name)));
  const chart = {
    name: "explorer", title: "Any metric", traces: [],
    about: "Every number that the run has logged, by its name in metrics.jsonl.",
    layout: { xaxis: { title: { text: "step" } } },
  };
  const figure = report.figure(chart);
  const plot = figure.querySelector(".plot");
  figure.querySelector("details").remove(); // its numbers are the file's
  figure.insertBefore(report.element("label", {}, "metric", pick), plot);
  const chosen = async () => {
    const series = await report.series();
    const traces = runs.flatMap((run, number) => {
      const found = series[number][pick.value];
      return found ? [{ type: "scatter", mode: found.steps.length > 30 ? "lines" : "lines+markers", name: run, x: found.steps, y: found.values, line: { color: COLOURS[number] } }] : [];
    });
    return { ...chart, traces };
  };
  pick.addEventListener("change", async () => report.redraw(plot, await chosen()));
  report.section("explorer-section", "Any metric", report.element("div", { class: "charts" }, figure));

  if (runs.length > 1) {
    const rows = differences.map(([key, first, second]) => [key, first, second]);
    report.section(
      "recipes", "Differences of the recipes",
      rows.length ? report.table(["key", ...runs], rows, [1, 2]) : report.element("p", {}, "The two recipes are equal."),
    );
  }

  // The charts in sight come first, then what must be unpacked.
  requestAnimationFrame(() => setTimeout(async () => {
    await report.startChanges();
    if (report.startSamples) await report.startSamples();
    report.offer(plot, await chosen());
    report.startCharts();
    document.documentElement.dataset.ready = "yes";
  }));

  // Served by `report --serve --watch`: a newer page is offered, never forced, for a reader may be in the middle of it.
  if (report.page.version_url) {
    let mine = null;
    setInterval(async () => {
      try {
        const version = await (await fetch(report.page.version_url)).text();
        mine ??= version;
        document.getElementById("newer").hidden = version === mine;
      } catch { /* the server has been stopped; the page goes on as it is */ }
    }, 3000);
    document.getElementById("newer").addEventListener("click", () => location.reload());
  }
})();
