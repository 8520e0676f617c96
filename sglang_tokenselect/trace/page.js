// SPDX-License-Identifier: Apache-2.0
// Buttons, keys, lists and the address.

const TOP = 14, MOST_MARKS = 20, SNIPPET = 26, MARK_LABEL = 24;

function make(tag, className, text = "") {
  const element = document.createElement(tag);
  if (className) element.className = className;
  element.textContent = text;
  return element;
}

function makeButton(text, onClick, title = "") {
  const button = make("button", "", text);
  button.type = "button";
  if (title) button.title = title;
  button.addEventListener("click", onClick);
  return button;
}

function buildControls() {
  const written = texts.slice(facts.promptTokens);
  const first = makeButton(visible(written[0]) || "…", () => {}, "The prefill writes this token; its attention is not recorded");
  first.disabled = true;
  byId("steps").append(first, ...steps.map((_, step) => {
    const text = visible(written[step + 1]) || "…";
    const button = makeButton(text, () => show({ step }), `Step ${step}`);
    button.setAttribute("aria-label", `Step ${step}, writes ${text}`);
    button.style.setProperty("--share", barWeight(step, ALL));
    return button;
  }));
  byId("layers").append(
    makeButton("all layers", () => show({ layer: ALL }), "Of each token the greatest weight in any layer"),
    ...layers.map((number, layer) => makeButton(String(number), () => show({ layer }), `Layer ${number}`)),
  );
  for (const id of ["marks-section", "marked-legend"]) byId(id).hidden = !marks.length;
  byId("bar-legend").append(marks.length ? "weight of the marked text" : "weight of the first voted token");
  const about = [`${asCount(facts.promptTokens)} tokens of prompt`, `${layers.length} layers`, `${steps.length} decode steps`];
  byId("about").textContent = about.join(" · ");
}

function showControls() {
  [...byId("steps").children].slice(1).forEach((button, step) => {
    button.setAttribute("aria-pressed", step === view.step);
  });
  [...byId("layers").children].forEach((button, index) => {
    button.setAttribute("aria-pressed", index - 1 === view.layer);
    button.style.setProperty("--share", barWeight(view.step, index - 1));
  });
}

function statusLines() {
  const { attended, everything, seqLen } = shown, lines = [make("p", "")];
  const reads = cellStart(seqLen - 1), writes = cellStart(seqLen);
  lines[0].append(
    "Reading ", make("q", "", visible(texts[reads])), `, token ${asCount(seqLen - 1)}: writes `, make("q", "", visible(texts[writes])),
  );
  const where = view.layer === ALL ? `any of ${layers.length} layers` : `layer ${layers[view.layer]}`;
  if (everything) {
    const who = view.layer === ALL ? `${everything} of ${layers.length} layers attend` : `Layer ${layers[view.layer]} attends`;
    lines.push(make("p", "", `${who} to everything; the weights are not recorded.`));
  }
  if (attended) {
    const share = `${((100 * attended) / seqLen).toFixed(1)}%`;
    lines.push(make("p", "", `Attends to ${asCount(attended)} of ${asCount(seqLen)} tokens (${share}) in ${where}.`));
  }
  if (marks.length && attended) lines.push(markedLine());
  return lines;
}

function markedLine() {
  const found = marks.map((mark) => inMark(shown.weights, mark)), places = found.filter((mark) => mark.attended).length;
  document.body.dataset.found = places;
  if (!places) return make("p", "", "Marked text: not attended.");
  const weight = Math.max(...found.map((mark) => mark.weight));
  return make("p", "yes", `Marked text: attended in ${places} of ${marks.length} places, weight up to ${asWeight(weight)}.`);
}

function listItem(weight, snippet, place, token) {
  const item = make("li", ""), button = makeButton("", () => scrollToToken(token));
  button.append(make("span", "weight", weight), snippet, make("span", "place", place));
  button.dataset.token = token;
  item.append(button);
  return item;
}

function snippetOf(token) {
  const start = cellStart(token), end = cellEnd(start), snippet = make("span", "snippet");
  const before = visible(texts.slice(Math.max(0, start - SNIPPET), start).join("")).slice(-SNIPPET / 2);
  const after = visible(texts.slice(end, end + SNIPPET).join("")).slice(0, SNIPPET);
  snippet.append(before, make("b", "", visible(texts[start])), after);
  return snippet;
}

function markItem(mark) {
  const { attended, weight } = inMark(shown.weights, mark);
  const place = `${attended} of ${mark.end - mark.start} tokens`;
  // Of a long one the end: a needle has its value there.
  const label = visible(mark.label.length > MARK_LABEL ? `…${mark.label.slice(-MARK_LABEL)}` : mark.label);
  return listItem(attended ? asWeight(weight) : "-", make("span", "snippet", label), place, mark.start);
}

function showLists() {
  byId("status").replaceChildren(...statusLines());
  const items = marks.slice(0, MOST_MARKS).map(markItem);
  if (marks.length > MOST_MARKS) items.push(make("li", "quiet", `and ${asCount(marks.length - MOST_MARKS)} more`));
  byId("marks").replaceChildren(...items);
  const tops = votedTokens(shown).slice(0, TOP);
  byId("top").replaceChildren(
    ...tops.map((token) => listItem(asWeight(shown.weights[token]), snippetOf(token), asCount(token), token)),
  );
  return tops;
}

function show(change) {
  Object.assign(view, change);
  const layer = view.layer === ALL ? "all" : layers[view.layer];
  history.replaceState(null, "", `#step=${view.step}&layer=${layer}`);
  Object.assign(document.body.dataset, { step: view.step, layer, found: 0 });
  shown = select(view.step, view.layer);
  showControls();
  const [first] = showLists();
  drawMap();
  if (byId("follow").checked && first !== undefined) scrollToToken(first);
  refresh();
}

/** What the address asks for; what it does not tell, or tells wrongly, stays as it is. */
function fromAddress() {
  const asked = new URLSearchParams(location.hash.slice(1)), change = {};
  const step = Number(asked.get("step") ?? NaN), layer = asked.get("layer");
  if (step in steps) change.step = step;
  if (layer === "all") change.layer = ALL;
  else if (layer !== null && layers.includes(Number(layer))) change.layer = layers.indexOf(Number(layer));
  return change;
}

function onKey(event) {
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  const inText = event.target === byId("text");
  const move = (now, by, lowest, highest) => Math.max(lowest, Math.min(highest, now + by));
  const by = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
  if (!by) return;
  if (event.key === "ArrowLeft" || event.key === "ArrowRight") show({ step: move(view.step, by, 0, steps.length - 1) });
  else if (inText) return; // scrolls
  else show({ layer: move(view.layer, by, ALL, layers.length - 1) });
  event.preventDefault();
}

function start() {
  buildText();
  buildControls();
  show(fromAddress());
  document.addEventListener("keydown", onKey);
  window.addEventListener("hashchange", () => show(fromAddress()));
  window.addEventListener("resize", () => { drawMap(); refresh(); });
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawMap);
  byId("text").addEventListener("scroll", refresh, { passive: true });
  byId("map").addEventListener("click", (event) => {
    const { left, width } = byId("map").getBoundingClientRect();
    scrollToToken(Math.min(texts.length - 1, Math.floor(((event.clientX - left) / width) * texts.length)));
  });
}

start();
