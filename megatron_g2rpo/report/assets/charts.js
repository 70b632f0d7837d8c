// SPDX-License-Identifier: Apache-2.0
// Charts: drawn when they come into sight, in the colours of the page, with their numbers as a table.
"use strict";

(() => {
  const ROWS = 400; // of a table of numbers
  // Dragging zooms where there is a pointer; a finger scrolls the page.
  const POINTER = matchMedia("(hover: hover) and (pointer: fine)").matches;
  const OPTIONS = {
    displaylogo: false, responsive: true, displayModeBar: POINTER ? "hover" : false,
    modeBarButtonsToRemove: ["lasso2d", "select2d"],
  };
  const drawn = new Set();
  const waiting = new Map(); // plot -> chart

  const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  /** The layout that every chart has, in today's colours. */
  const shared = () => {
    const axis = {
      gridcolor: style("--grid"), zerolinecolor: style("--edge"), linecolor: style("--edge"), automargin: true, title: { standoff: 8 },
    };
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: style("--text"), size: 12 },
      margin: { l: 50, r: 10, t: 10, b: 40 }, hovermode: "x unified", dragmode: POINTER ? "zoom" : false,
      hoverlabel: { bgcolor: style("--panel"), font: { color: style("--text") } },
      // At the bottom of the whole figure, which leaves the axis's title its place however many lines the legend has.
      legend: { orientation: "h", yref: "container", y: 0, yanchor: "bottom", x: 0, font: { size: 11 } }, xaxis: axis, yaxis: axis,
    };
  };

  const merged = (base, more) => {
    const found = { ...base };
    for (const [key, value] of Object.entries(more)) {
      const both = value && base[key] && typeof value === "object" && !Array.isArray(value);
      found[key] = both ? merged(base[key], value) : value;
    }
    return found;
  };

  const draw = (plot) => {
    const chart = waiting.get(plot);
    if (!chart || drawn.has(plot)) return;
    drawn.add(plot);
    Plotly.newPlot(plot, chart.traces, merged(shared(), chart.layout), OPTIONS);
  };

  /** A chart whose numbers have come: drawn when it comes into sight. */
  report.offer = (plot, chart) => {
    waiting.set(plot, chart);
    if (drawn.has(plot)) report.redraw(plot, chart); // the page was printed before
    else plots.push(plot);
  };

  report.redraw = (plot, chart) => {
    waiting.set(plot, chart);
    drawn.delete(plot);
    draw(plot);
  };
  report.drawAll = () => waiting.forEach((_, plot) => draw(plot));
  report.recolour = () => drawn.forEach((plot) => {
    const chart = waiting.get(plot);
    Plotly.react(plot, chart.traces, merged(shared(), chart.layout), OPTIONS);
  });

  const numbers = (chart) => {
    const named = chart.traces.filter((trace) => trace.hoverinfo !== "skip");
    const steps = [...new Set(named.flatMap((trace) => trace.x))];
    if (steps.every((step) => typeof step === "number")) steps.sort((a, b) => a - b);
    const known = named.map((trace) => new Map(trace.x.map((x, place) => [x, trace.y[place]])));
    const every = Math.max(1, Math.ceil(steps.length / ROWS));
    const rows = steps.filter((_, place) => place % every === 0).map((step) => [String(step), ...known.map((each) => each.get(step) ?? null)]);
    const axis = chart.layout.xaxis?.title?.text ?? "";
    return report.table([axis, ...named.map((trace) => trace.name)], rows);
  };

  report.figure = (chart) => {
    const plot = report.element("div", { class: "plot", role: "img", "aria-label": `${chart.title}. ${chart.about}`, "data-chart": chart.name });
    const details = report.element("details", {}, report.element("summary", {}, "Numbers"));
    details.addEventListener("toggle", () => details.childElementCount === 1 && details.append(numbers(chart)));
    waiting.set(plot, chart);
    return report.element(
      "figure", { id: `chart-${chart.name}` },
      report.element("h3", {}, chart.title), report.element("p", { class: "soft" }, chart.about), plot, details,
    );
  };

  const plots = [];
  const drawNear = (rootMargin) => {
    const sight = new IntersectionObserver(
      (entries) => entries.filter((entry) => entry.isIntersecting).forEach((entry) => draw(entry.target)), { rootMargin },
    );
    plots.forEach((plot) => sight.observe(plot));
  };

  for (const [number, section] of report.page.sections.entries()) {
    const grid = report.element("div", { class: "charts" }, ...section.charts.map(report.figure));
    const missing = section.missing.map((each) => `${each.title} (needs ${each.needs})`);
    report.section(
      `section-${number}`, section.title, grid,
      missing.length ? report.element("p", { class: "soft missing" }, `Not shown: ${missing.join("; ")}.`) : null,
    );
    plots.push(...grid.querySelectorAll(".plot"));
  }
  drawNear("0px"); // what a reader sees comes first
  report.startCharts = () => drawNear("300px");

  const themes = ["auto", "light", "dark"];
  const button = document.getElementById("theme");
  button.addEventListener("click", () => {
    const next = themes[(themes.indexOf(button.dataset.theme) + 1) % themes.length];
    button.dataset.theme = next;
    button.textContent = `Theme: ${next}`;
    if (next === "auto") document.documentElement.removeAttribute("data-theme");
    else document.documentElement.dataset.theme = next;
    report.recolour();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => report.recolour());
  addEventListener("beforeprint", report.drawAll);
})();
