// SPDX-License-Identifier: Apache-2.0
// The page's data, what is looked at, and what was attended to there.

const byId = (id) => document.getElementById(id);
const showError = (text) => { byId("errors").hidden = false; byId("errors").textContent += text + "\n"; };
window.onerror = (message, _, line) => showError(`${message} (line ${line})`);

const facts = JSON.parse(byId("facts").textContent);
const bytes = fromBase64(facts.data);
const { texts, marks, layers, steps } = facts;
const ALL = -1; // in place of a layer's index
const view = { step: 0, layer: ALL };
let shown; // what `select` returned for the view

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
