// SPDX-License-Identifier: Apache-2.0
// The text: chunks of plain text with a position each; those that can be seen get their highlights.

const CHUNK_TOKENS = 128;
const chunks = [];

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

/** Chunks that the pane shows, and those up to `margin` of its height away. */
function chunksInView(margin) {
  const pane = byId("text").getBoundingClientRect(), more = margin * pane.height;
  return chunks.filter(({ element }) => {
    const { top, bottom } = element.getBoundingClientRect();
    return bottom > pane.top - more && top < pane.bottom + more;
  });
}
