// SPDX-License-Identifier: Apache-2.0
// Reads the recordings as page.py packs them. No DOM here: the tests run this file with node.
"use strict";

function fromBase64(text) {
  const characters = atob(text);
  const bytes = new Uint8Array(characters.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = characters.charCodeAt(i);
  return bytes;
}

/** A non-negative float16. */
function fromHalf(bits) {
  const exponent = bits >> 10, fraction = bits & 1023;
  return exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : fraction * 2 ** -24;
}

/** Attended positions, ascending, and their weights. `place` is [offset, tokens]. */
function decodeRow(bytes, place) {
  let [offset, tokens] = place;
  const positions = new Int32Array(tokens), weights = new Float32Array(tokens);
  let position = -1;
  for (let i = 0; i < tokens; i++) {
    let gap = 0, shift = 0, byte;
    do {
      byte = bytes[offset++];
      gap |= (byte & 127) << shift;
      shift += 7;
    } while (byte & 128);
    position += gap + 1;
    positions[i] = position;
  }
  for (let i = 0; i < tokens; i++, offset += 2) weights[i] = fromHalf(bytes[offset] | (bytes[offset + 1] << 8));
  return { positions, weights };
}
