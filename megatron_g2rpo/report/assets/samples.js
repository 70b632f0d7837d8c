// SPDX-License-Identifier: Apache-2.0
// The viewer of samples: an index that is filtered and sorted, and the groups that it finds, opened chunk by chunk.
"use strict";

(() => {
  const GROUPS = 5; // of a page of results
  const ANSWERS = 16; // of a group that are shown at first
  const TOKENS = 400; // of a response that are shown at first
  const NATS = 100;
  const sets = report.page.samples;
  if (!sets.length) {
    report.section("samples", "Samples", report.element("p", {}, "This run has recorded no rollouts (logger.rollouts), so there are no samples to show."));
    return;
  }

  // -- text ----------------------------------------------------------------------------------------------------------
  // Control characters and marks of direction would act on the text around them: they are shown by their numbers.
  const ACTING = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff]/gu;
  const visible = (text) => {
    const parts = [];
    let end = 0;
    for (const found of text.matchAll(ACTING)) {
      const code = found[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
      parts.push(text.slice(end, found.index), report.element("span", { class: "code" }, `⟨U+${code}⟩`));
      end = found.index + found[0].length;
    }
    return [...parts, text.slice(end)].filter((part) => part !== "");
  };
  const block = (text) => report.element("div", { class: "text", dir: "auto" }, ...visible(text));

  // -- colours of tokens ---------------------------------------------------------------------------------------------
  const red = (strength) => `rgba(214, 69, 65, ${Math.min(1, Math.max(0, strength)) * 0.7})`;
  const blue = (strength) => `rgba(58, 124, 214, ${Math.min(1, Math.max(0, strength)) * 0.7})`;
  const COLOURS = {
    none: { label: "nothing", about: "", of: () => "" },
    logprob: { label: "log-probability", about: "the redder, the less likely the trainer found the token (full at −3 nats)", of: (row, i) => (row.old[i] == null ? "" : red(-row.old[i] / NATS / 3)) },
    gap: { label: "gap", about: "trainer minus engine: red where the engine found it likelier, blue where the trainer did (full at 0.5 nats)", of: (row, i) => { const gap = gapOf(row, i); return gap === null ? "" : gap < 0 ? red(-gap / 0.5) : blue(gap / 0.5); } },
    entropy: { label: "entropy", about: "the redder, the more undecided (full at 2 nats)", of: (row, i) => (row.entropy[i] == null ? "" : red(row.entropy[i] / NATS / 2)) },
    advantage: { label: "advantage", about: "the same for all tokens of an answer: blue is reinforced, red is suppressed (full at 2)", of: (row, i, advantage) => (advantage === null ? "" : advantage < 0 ? red(-advantage / 2) : blue(advantage / 2)) },
  };
  const gapOf = (row, i) => (row.old[i] == null || row.behaviour[i] == null ? null : (row.old[i] - row.behaviour[i]) / NATS);
  const nats = (value) => (value == null ? "–" : (value / NATS).toFixed(2));

  const tokens = (row, advantage, vocabulary, mode, limit) => {
    const box = report.element("div", { class: "text tokens", dir: "auto" });
    for (let i = 0; i < Math.min(limit, row.ids.length); i += 1) {
      const gap = gapOf(row, i);
      const span = report.element(
        "span",
        { title: `token ${row.ids[i]} · log-probability ${nats(row.old[i])} (trainer), ${nats(row.behaviour[i])} (engine) · gap ${gap === null ? "–" : gap.toFixed(2)} · entropy ${nats(row.entropy[i])}` },
        ...visible(vocabulary[row.ids[i]] ?? `[${row.ids[i]}]`),
      );
      span.style.backgroundColor = COLOURS[mode].of(row, i, advantage);
      box.append(span);
    }
    if (row.ids.length > limit) {
      const button = report.element("button", { type: "button" }, `all ${row.ids.length} tokens`);
      button.addEventListener("click", () => box.replaceWith(tokens(row, advantage, vocabulary, mode, Infinity)));
      box.append(" ", button);
    }
    return box;
  };

  // -- the form ------------------------------------------------------------------------------------------------------
  const select = (id, label, options) =>
    report.element("label", {}, label, report.element("select", { id }, ...options.map(([value, text]) => report.element("option", { value }, text))));
  const range = (id, label, step) => {
    const end = (side) => report.element("input", { id: `${id}-${side}`, type: "number", step, placeholder: side, "aria-label": `${label}, ${side}` });
    return report.element("label", {}, label, report.element("fieldset", {}, end("min"), end("max")));
  };
  const SORTS = {
    step: "step", reward: "lowest reward", "-reward": "highest reward", change: "lost most since the prompt's last time",
    "-change": "gained most since the prompt's last time", "-tokens": "longest", tokens: "shortest", "-size": "largest advantage, either sign",
    size: "smallest advantage: groups without signal",
  };
  const form = report.element(
    "form", { "aria-label": "Filter samples" },
    sets.length > 1 ? select("f-run", "run", sets.map((each, number) => [number, each.run])) : null,
    select("f-task", "task", [["", "all"], ...report.page.tasks.map((task) => [task, task])]),
    range("f-step", "step", 1), range("f-reward", "reward", "any"), range("f-tokens", "tokens", 1),
    select("f-truncated", "truncated", [["", "either"], ["1", "yes"], ["0", "no"]]),
    select("f-sort", "sort by", Object.entries(SORTS)),
    select("f-colour", "colour tokens by", Object.entries(COLOURS).map(([value, each]) => [value, each.label])),
    report.element("button", { type: "reset" }, "Clear"),
  );
  const count = report.element("p", { id: "f-count", role: "status", "aria-live": "polite" });
  const legend = report.element("p", { id: "f-legend", class: "soft legend" });
  const notes = report.element("div", { class: "soft", id: "f-notes" });
  const results = report.element("div", { id: "f-results" });
  const previous = report.element("button", { type: "button", id: "f-previous" }, "Previous");
  const next = report.element("button", { type: "button", id: "f-next" }, "Next");
  const place = report.element("span", { class: "soft" });
  const section = report.section(
    "samples", "Samples",
    report.element(
      "p", { class: "soft" },
      "Whole groups, the answers to one prompt side by side; answers that the filter leaves out are pale. Green box: " +
      "the reference; orange: answers. Keys: j and k go to the next and the previous group, n and p to the next and the previous page.",
    ),
    notes, form, legend, count, results, report.element("div", { class: "bar" }, previous, next, place),
  );

  // -- filtering -----------------------------------------------------------------------------------------------------
  const get = (id) => document.getElementById(id)?.value ?? "";
  const bound = (id, otherwise) => (get(id) === "" ? otherwise : Number(get(id)));
  const loaded = new Map();
  const load = (number) => {
    if (!loaded.has(number)) {
      loaded.set(number, (async () => {
        const data = report.block(`samples-${number}`);
        return { ...data, index: await report.unpacked(data.index), pictures: null, opened: new Map() };
      })());
    }
    return loaded.get(number);
  };
  const open = (set, chunk) => {
    if (!set.opened.has(chunk)) set.opened.set(chunk, report.unpacked(set.chunks[chunk]));
    return set.opened.get(chunk);
  };

  const matching = ({ index, tasks }) => {
    const task = get("f-task") === "" ? null : tasks.indexOf(get("f-task"));
    const truncated = get("f-truncated");
    const limits = ["step", "reward", "tokens"].map((name) => [index[name], bound(`f-${name}-min`, -Infinity), bound(`f-${name}-max`, Infinity)]);
    const rows = [];
    for (let row = 0; row < index.step.length; row += 1) {
      if (task !== null && index.task[row] !== task) continue;
      if (truncated !== "" && index.truncated[row] !== Number(truncated)) continue;
      const inside = limits.every(([column, low, high]) => {
        const unbounded = low === -Infinity && high === Infinity;
        return unbounded || (column[row] !== null && column[row] >= low && column[row] <= high);
      });
      if (inside) rows.push(row);
    }
    return rows;
  };

  const sorted = ({ index }, rows) => {
    const by = get("f-sort") || "step";
    const sign = by.startsWith("-") ? -1 : 1;
    const name = by.replace("-", "");
    const value = name === "size" ? (row) => (index.advantage[row] === null ? null : Math.abs(index.advantage[row])) : (row) => index[name][row];
    const known = name === "change" || name === "reward" || name === "size" ? rows.filter((row) => value(row) !== null) : rows;
    return [...known].sort((one, other) => sign * (value(one) - value(other)) || one - other);
  };

  let page = 0;
  let asked = 0;
  const state = { groups: [], rows: new Set(), rank: new Map(), set: null };

  const refresh = async () => {
    const mine = (asked += 1);
    const set = await load(Number(get("f-run") || 0));
    if (mine !== asked) return; // a later change has been made meanwhile
    const rows = matching(set);
    const order = sorted(set, rows);
    const groups = new Map();
    for (const row of order) {
      const key = `${set.index.chunk[row]}/${set.index.group[row]}`;
      if (!groups.has(key)) groups.set(key, row);
    }
    Object.assign(state, {
      set, rows: new Set(rows), rank: new Map(order.map((row, number) => [row, number])), groups: [...groups.values()],
    });
    count.textContent = `${rows.length.toLocaleString("en")} of ${set.index.step.length.toLocaleString("en")} rollouts in ${groups.size.toLocaleString("en")} groups` + (order.length < rows.length ? `; ${rows.length - order.length} without a value to sort by are left out` : "");
    notes.replaceChildren(...set.notes.map((note) => report.element("p", {}, note)));
    page = 0;
    await show();
  };

  const show = async () => {
    const { set, groups } = state;
    const mode = get("f-colour") || "none";
    legend.textContent = COLOURS[mode].about;
    const pages = Math.max(1, Math.ceil(groups.length / GROUPS));
    page = Math.min(Math.max(page, 0), pages - 1);
    const mine = asked;
    const cards = [];
    for (const row of groups.slice(page * GROUPS, (page + 1) * GROUPS)) {
      const found = (await open(set, set.index.chunk[row]))[set.index.group[row]];
      cards.push(card(set, found, firstRow(set, row), mode));
    }
    if (mine !== asked) return;
    results.replaceChildren(...(cards.length ? cards : [report.element("p", {}, "No sample fits the filter.")]));
    place.textContent = `page ${page + 1} of ${pages}`;
    previous.disabled = page === 0;
    next.disabled = page >= pages - 1;
  };

  /** The rows of a group lie one after the other in the index. */
  const firstRow = (set, row) => row - set.index.place[row];

  // -- a group -------------------------------------------------------------------------------------------------------
  const SVG = "http://www.w3.org/2000/svg";
  const rectangle = ([x1, y1, x2, y2], kind, answer) => {
    const made = document.createElementNS(SVG, "rect");
    const values = { x: Math.min(x1, x2), y: Math.min(y1, y2), width: Math.abs(x2 - x1), height: Math.abs(y2 - y1), class: kind };
    for (const [key, value] of Object.entries(values)) made.setAttribute(key, value);
    if (answer !== undefined) made.dataset.answer = answer;
    return made;
  };

  const picture = (set, image, group, number) => {
    if (image.picture === undefined) {
      return report.element("div", { class: "placeholder", role: "img", "aria-label": `no picture: ${image.fault}` }, `no picture: ${image.fault}`);
    }
    set.pictures ??= report.block(`pictures-${get("f-run") || 0}`);
    const box = report.element("div", { class: "picture" }, report.element("img", { src: set.pictures[image.picture], alt: image.name, loading: "lazy" }));
    if (number === group.boxed) {
      const drawing = document.createElementNS(SVG, "svg");
      drawing.setAttribute("viewBox", "0 0 1 1");
      drawing.setAttribute("preserveAspectRatio", "none");
      drawing.append(
        ...group.boxes.map((corners) => rectangle(corners, "reference")),
        ...group.rows.flatMap((row, answer) => row.boxes.map((corners) => rectangle(corners, "answer", answer))),
      );
      box.append(drawing);
    }
    return box;
  };

  const card = (set, group, first, mode) => {
    const made = report.element(
      "article", { tabindex: 0, "data-key": group.key },
      report.element("h3", {}, `${group.task} · step ${group.step} · ${group.key}`),
      report.element("div", { class: "pictures" }, ...group.images.map((image, number) => picture(set, image, group, number))),
      block(group.question),
      report.element("p", { class: "soft" }, `reference (${group.format}): `, report.element("bdi", {}, ...visible(group.reference))),
      report.element("details", {}, report.element("summary", {}, "Prompt as the model reads it"), block(group.prompt)),
    );
    const answers = report.element("div", { class: "answers" });
    // In the order that was asked for; what the filter leaves out comes last.
    const rank = (number) => state.rank.get(first + number) ?? Number.MAX_SAFE_INTEGER;
    const order = group.rows.map((_, number) => number).sort((one, other) => rank(one) - rank(other) || one - other);
    const fill = (limit) => answers.replaceChildren(...order.slice(0, limit).map((number) => response(set, group, number, first + number, mode, made)));
    fill(ANSWERS);
    made.append(answers);
    if (order.length > ANSWERS) {
      const button = report.element("button", { type: "button" }, `all ${order.length} answers`);
      button.addEventListener("click", () => { fill(order.length); button.remove(); });
      made.append(button);
    }
    return made;
  };

  const response = (set, group, number, row, mode, article) => {
    const answer = group.rows[number];
    const { reward, advantage, change, tokens: length, truncated } = set.index;
    const said = [
      `${length[row]} tokens`, truncated[row] ? "truncated" : null, answer.formed ? null : "not well formed",
      answer.masked ? `left out: ${answer.masked}` : null, change[row] === null ? null : `since last time ${report.number(change[row], 2)}`,
    ].filter((each) => each !== null);
    const parts = Object.entries(answer.parts).map(([name, value]) => `${name} ${report.number(value, 2)}`).join(", ");
    const named = answer.ids.length > 0 && Object.keys(set.vocabulary).length > 0;
    const made = report.element(
      "div", { class: state.rows.has(row) ? "response" : "response other", tabindex: 0 },
      report.element("h4", {}, `#${answer.sample} · reward ${report.number(reward[row], 2)} · advantage ${report.number(advantage[row], 2)}`),
      report.element("p", { class: "soft" }, `${parts ? `${parts} · ` : ""}${said.join(", ")}`),
      named && mode !== "none" ? tokens(answer, advantage[row], set.vocabulary, mode, TOKENS) : block(answer.text),
      answer.answer === null ? report.element("p", { class: "soft" }, "no answer found in it") : report.element("p", { class: "soft" }, "answer: ", report.element("bdi", {}, ...visible(answer.answer))),
    );
    const pick = (on) => {
      article.classList.toggle("picking", on && answer.boxes.length > 0);
      article.querySelectorAll(`rect[data-answer="${number}"]`).forEach((each) => each.classList.toggle("picked", on));
    };
    for (const [event, on] of [["mouseenter", true], ["focus", true], ["mouseleave", false], ["blur", false]]) made.addEventListener(event, () => pick(on));
    return made;
  };

  // -- events --------------------------------------------------------------------------------------------------------
  const turn = async (by) => {
    page += by;
    await show();
    section.querySelector("article")?.focus({ preventScroll: true });
    form.scrollIntoView();
  };
  previous.addEventListener("click", () => turn(-1));
  next.addEventListener("click", () => turn(1));
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(refresh));
  const refreshSoon = report.later(refresh);
  form.addEventListener("input", (event) => (event.target.id === "f-colour" ? show() : refreshSoon()));
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
    if (!["j", "k", "n", "p"].includes(event.key) || !state.set) return;
    event.preventDefault();
    if (event.key === "n") { if (!next.disabled) turn(1); return; }
    if (event.key === "p") { if (!previous.disabled) turn(-1); return; }
    const cards = [...results.querySelectorAll("article")];
    const at = cards.indexOf(document.activeElement?.closest?.("article"));
    const goal = cards[event.key === "j" ? Math.min(at + 1, cards.length - 1) : Math.max(at - 1, 0)];
    goal?.focus();
    goal?.scrollIntoView({ block: "nearest" });
  });

  /** Show the samples of a task between two steps; by reward, where no prompt of theirs has a last time to compare with. */
  report.showSamples = async ({ task, from, to, sort }) => {
    form.reset();
    for (const [id, value] of [["f-task", task], ["f-step-min", from], ["f-step-max", to], ["f-sort", sort]]) document.getElementById(id).value = value;
    asked += 1;
    const set = await load(Number(get("f-run") || 0));
    if (sort === "change" && matching(set).every((row) => set.index.change[row] === null)) document.getElementById("f-sort").value = "reward";
    await refresh();
    section.scrollIntoView();
  };
  report.startSamples = refresh;
})();
