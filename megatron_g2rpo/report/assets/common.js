// SPDX-License-Identifier: Apache-2.0
// What all parts of the page use: the data in it, and elements made of it. What a model wrote is only ever set as the
// text of a node; nothing on this page parses HTML.
"use strict";

const report = {};

/** The JSON of a data block. */
report.block = (id) => JSON.parse(document.getElementById(id).textContent);

/** The JSON in the base64 of a gzip. */
report.unpacked = async (base64) => {
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let place = 0; place < text.length; place += 1) bytes[place] = text.charCodeAt(place); // a third of the time that `from` takes
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
};

/** A new element; children that are no nodes become text. */
report.element = (name, attributes = {}, ...children) => {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === false || value === null || value === undefined) continue;
    made.setAttribute(key, value === true ? "" : String(value));
  }
  made.append(...children.filter((child) => child !== null).map((child) => (child instanceof Node ? child : String(child))));
  return made;
};

/** A number with as many digits as a reader needs. */
report.number = (value, digits = 3) =>
  value === null || value === undefined || Number.isNaN(value) ? "–" : value.toFixed(digits).replace("-", "−");

/** A change with its sign: green, red, or without a colour where it is none, or no larger than its interval. */
report.signed = (value, error = 0) => {
  const text = Math.abs(value).toFixed(3);
  const kind = Number(text) === 0 || Math.abs(value) <= error ? "figure" : value < 0 ? "figure bad" : "figure good";
  return report.element("span", { class: kind }, Number(text) === 0 ? text : `${value < 0 ? "−" : "+"}${text}`);
};

const figures = (cell) => typeof cell === "number" || (cell instanceof Node && cell.classList.contains("figure"));

/** A table of rows, numbers to the right; `wide` columns may break. */
report.table = (heading, rows, wide = []) =>
  report.element(
    "div", { class: "scroll", tabindex: 0, role: "region", "aria-label": heading.join(", ") },
    report.element(
      "table", {},
      report.element("thead", {}, report.element(
        "tr", {},
        ...heading.map((each, column) => report.element("th", { scope: "col", class: rows.some((row) => figures(row[column])) && "number" }, each)),
      )),
      report.element(
        "tbody", {},
        ...rows.map((row) => report.element(
          "tr", {},
          ...row.map((cell, column) => {
            const kind = figures(cell) ? "number" : wide.includes(column) ? "wide" : false;
            return report.element("td", { class: kind }, typeof cell === "number" ? report.number(cell) : cell ?? "–");
          }),
        )),
      ),
    ),
  );

/** A section of the page with its line in the navigation. */
report.section = (id, title, ...children) => {
  const section = report.element("section", { id, "aria-label": title }, report.element("h2", {}, title), ...children);
  document.getElementById("sections").append(section);
  document.getElementById("navigation").append(
    report.element("li", {}, report.element("a", { href: `#${id}` }, title)),
  );
  return section;
};

/** Calls `then` once, `wait` milliseconds after the last of several calls. */
report.later = (then, wait = 120) => {
  let timer = null;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(then, wait);
  };
};

report.page = report.block("page");

let series = null;
/** Every metric of every run: a list of {name: {steps, values}}. */
report.series = () => (series ??= report.unpacked(report.page.series));
