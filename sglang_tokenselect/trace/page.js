// SPDX-License-Identifier: Apache-2.0
"use strict";

const CHUNK_TOKENS = 128, TOP = 14, MOST_MARKS = 20, SNIPPET = 26, MARK_LABEL = 24;
const byId = (id) => document.getElementById(id);
const showError = (text) => { byId("errors").hidden = false; byId("errors").textContent += text + "\n"; };
window.onerror = (message, _, line) => showError(`${message} (line ${line})`);

const facts = JSON.parse(byId("facts").textContent);
const bytes = fromBase64(facts.data);
const { texts, marks, layers, steps } = facts;
const ALL = -1; // in place of a layer's index
const view = { step: 0, layer: ALL };
let shown; // what `select` returned for the view
const chunks = [];

// ---- what was attended to

const decoded = new Map();
function rowOf(step, layer) {
  const key = step * layers.length + layer, place = steps[step].rows[layer];
  if (place && !decoded.has(key)) decoded.set(key, decodeRow(bytes, place));
  return place && decoded.get(key); // null: everything
}

/** One layer, or the greatest weight that any layer gives. `weights` is NaN for what is not attended. */
function select(step, layer) {
  const chosen = layer === ALL ? layers.map((_, index) => index) : [layer];
  const weights = new Float32Array(texts.length).fill(NaN);
  let attended = 0, everything = 0;
  for (const index of chosen) {
    const row = rowOf(step, index);
    if (!row) { everything++; continue; }
    for (let i = 0; i < row.positions.length; i++) {
      const position = row.positions[i], before = weights[position];
      if (Number.isNaN(before)) attended++;
      if (!(before >= row.weights[i])) weights[position] = row.weights[i];
    }
  }
  return { weights, attended, everything, seqLen: steps[step].seqLen };
}

const isFixed = (position, seqLen) => position < facts.sink || position >= seqLen - facts.local;

/** Voted tokens, those of most weight first. */
function votedTokens({ weights, seqLen }) {
  const found = [];
  for (let i = 0; i < seqLen; i++) if (!Number.isNaN(weights[i]) && !isFixed(i, seqLen)) found.push(i);
  return found.sort((a, b) => weights[b] - weights[a] || a - b);
}

function inMark(weights, { start, end }) {
  let attended = 0, weight = 0;
  for (let i = start; i < end; i++) {
    if (!Number.isNaN(weights[i])) { attended++; weight = Math.max(weight, weights[i]); }
  }
  return { attended, weight };
}

/** What the bars show: the weight of the marked text, or of the voted tokens where nothing is marked. */
function barWeight(step, layer) {
  const selected = select(step, layer);
  if (marks.length) return Math.max(...marks.map((mark) => inMark(selected.weights, mark).weight));
  const { weights, seqLen } = selected;
  return weights.reduce((most, weight, i) => (weight > most && !isFixed(i, seqLen) ? weight : most), 0);
}

// ---- text

const strength = (weight) => 0.16 + 0.84 * Math.sqrt(Math.min(weight, 1));
const asWeight = (weight) => (weight >= 0.01 ? weight.toFixed(2) : weight >= 0.001 ? weight.toFixed(3) : "<0.001");
const asCount = (number) => number.toLocaleString("en");
const visible = (text) => text.replace(/\n/g, "⏎").replace(/\t/g, "⇥");
/** A token whose bytes are part of a character has no text; the first token of the character has it. */
function cellStart(token) { while (token > 0 && !texts[token]) token--; return token; }
function cellEnd(token) { do token++; while (token < texts.length && !texts[token]); return token; }

const markOf = new Uint8Array(texts.length);
for (const { start, end } of marks) markOf.fill(1, start, end);

function buildText() {
  for (let start = 0; start < texts.length;) {
    let end = Math.min(start + CHUNK_TOKENS, texts.length);
    if (end < texts.length) end = Math.max(cellStart(end), cellEnd(start));
    const element = document.createElement("div"), body = document.createElement("div");
    element.className = "chunk";
    element.append(make("span", "", asCount(start)), body);
    body.textContent = texts.slice(start, end).join("");
    chunks.push({ start, end, element, body, paintedFor: undefined });
    start = end;
  }
  byId("text").append(...chunks.map((chunk) => chunk.element));
}

/** The kind of a cell, as class names; its attended tokens count together. */
function kindOf(start, end) {
  const { weights, seqLen } = shown;
  let weight = NaN;
  for (let i = start; i < end; i++) if (!(weight >= weights[i]) && !Number.isNaN(weights[i])) weight = weights[i];
  const names = [];
  if (!Number.isNaN(weight)) names.push(isFixed(start, seqLen) ? "fixed" : "voted");
  if (names[0] === "voted" && weight > 0.3) names.push("strong");
  if (markOf[start]) names.push("marked");
  if (start <= seqLen - 1 && seqLen - 1 < end) names.push("reading");
  else if (start <= seqLen && seqLen < end) names.push("writing");
  else if (start > seqLen) names.push("future");
  return { names: names.join(" "), weight };
}

function paint(chunk) {
  if (chunk.paintedFor === shown) return;
  chunk.paintedFor = shown;
  const parts = [];
  let run = null; // cells of one kind; each voted one stands alone, for its weight
  for (let start = chunk.start, end; start < chunk.end; start = end) {
    end = cellEnd(start);
    const { names, weight } = kindOf(start, end);
    if (run && run.names === names && !names.startsWith("voted")) { run.end = end; continue; }
    run = { names, weight, start, end };
    parts.push(run);
  }
  chunk.body.replaceChildren(...parts.map(({ names, weight, start, end }) => {
    const text = texts.slice(start, end).join("");
    if (!names) return document.createTextNode(text);
    const span = make("span", names, text);
    Object.assign(span.dataset, { start, end });
    if (names.startsWith("voted")) {
      span.style.setProperty("--a", strength(weight).toFixed(3));
      span.title = `token ${asCount(start)}, weight ${asWeight(weight)}`;
    }
    return span;
  }));
}

const chunkOf = (token) => chunks.find((chunk) => token < chunk.end) ?? chunks[chunks.length - 1];

function scrollToToken(token) {
  const chunk = chunkOf(token), pane = byId("text");
  paint(chunk);
  const spans = [...chunk.body.querySelectorAll("span")];
  const target = spans.find((span) => span.dataset.start <= token && token < span.dataset.end) ?? chunk.element;
  const top = target.getBoundingClientRect().top - pane.getBoundingClientRect().top;
  pane.scrollTop += top - pane.clientHeight / 2;
  target.classList.remove("flash");
  void target.offsetWidth; // starts the animation anew
  target.classList.add("flash");
}

// ---- map

const MAP_ROW = Math.max(3, Math.min(13, Math.floor(160 / layers.length)));

function drawMap() {
  const canvas = document.querySelector("#map canvas"), scale = window.devicePixelRatio || 1;
  const width = canvas.clientWidth, height = layers.length * MAP_ROW + 10;
  canvas.style.height = `${height}px`;
  canvas.width = width * scale;
  canvas.height = height * scale;
  const context = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
  const color = (name) => style.getPropertyValue(name).trim();
  context.scale(scale, scale);
  const x = (token) => (token / texts.length) * width, thin = Math.max(1.5, width / texts.length);
  layers.forEach((_, index) => {
    const row = rowOf(view.step, index), y = 8 + index * MAP_ROW;
    context.globalAlpha = view.layer === ALL || view.layer === index ? 1 : 0.3;
    context.fillStyle = color("--fixed-map");
    if (!row) { context.fillRect(0, y, x(shown.seqLen), MAP_ROW - 1); return; }
    context.fillRect(0, y, x(Math.min(facts.sink, shown.seqLen)), MAP_ROW - 1);
    context.fillRect(x(shown.seqLen - facts.local), y, x(facts.local), MAP_ROW - 1);
    for (const [column, weight] of columns(row, width)) {
      context.fillStyle = `rgb(${color("--voted")} / ${strength(weight)})`;
      context.fillRect(column, y, thin, MAP_ROW - 1);
    }
  });
  context.globalAlpha = 1;
  context.fillStyle = color("--mark");
  for (const { start, end } of marks) {
    const middle = x((start + end) / 2);
    context.beginPath();
    context.moveTo(middle - 5, 0);
    context.lineTo(middle + 5, 0);
    context.lineTo(middle, 7);
    context.fill();
  }
}

/** Greatest weight of the voted tokens in each column of pixels that has any; the heaviest come last, on top. */
function columns({ positions, weights }, width) {
  const heaviest = new Map();
  for (let i = 0; i < positions.length; i++) {
    if (isFixed(positions[i], shown.seqLen)) continue;
    const column = Math.floor((positions[i] / texts.length) * width);
    heaviest.set(column, Math.max(heaviest.get(column) ?? 0, weights[i]));
  }
  return [...heaviest].sort((a, b) => a[1] - b[1]);
}

/** Chunks that the pane shows, and those up to `margin` of its height away. */
function chunksInView(margin) {
  const pane = byId("text").getBoundingClientRect(), more = margin * pane.height;
  return chunks.filter(({ element }) => {
    const { top, bottom } = element.getBoundingClientRect();
    return bottom > pane.top - more && top < pane.bottom + more;
  });
}

/** After what moved or changed the text: only what can be seen is painted. */
function refresh() {
  chunksInView(1).forEach(paint);
  const inView = chunksInView(0);
  if (!inView.length) return;
  const share = (token) => `${(100 * token) / texts.length}%`, [first] = inView, last = inView[inView.length - 1];
  Object.assign(byId("window").style, { left: share(first.start), width: share(last.end - first.start) });
}

// ---- controls

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

// ---- state

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
  byId("text").addEventListener("scroll", () => requestAnimationFrame(refresh), { passive: true });
  byId("map").addEventListener("click", (event) => {
    const { left, width } = byId("map").getBoundingClientRect();
    scrollToToken(Math.min(texts.length - 1, Math.floor(((event.clientX - left) / width) * texts.length)));
  });
}

start();
