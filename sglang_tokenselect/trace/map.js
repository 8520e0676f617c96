// SPDX-License-Identifier: Apache-2.0
// The map of the prompt: a row per layer, marks above, and a frame around the text that can be seen.

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

/** After what moved or changed the text: only what can be seen is painted. */
function refresh() {
  chunksInView(1).forEach(paint);
  const inView = chunksInView(0);
  if (!inView.length) return;
  const share = (token) => `${(100 * token) / texts.length}%`, [first] = inView, last = inView[inView.length - 1];
  Object.assign(byId("window").style, { left: share(first.start), width: share(last.end - first.start) });
}
