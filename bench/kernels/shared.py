# SPDX-License-Identifier: Apache-2.0
"""Decode of requests that share a prefix: its keys scored for each of them, and once for all."""

from __future__ import annotations

import functools

from bench.kernels.decode import dense, num_layers, row, time_hits
from bench.kernels.layers import WINDOW, DecodeLayers, Shape
from bench.kernels.timing import time_layers
from sglang_tokenselect.kernels.shared_prefix import score_shared

SHARED, OWN = 65_536, 1_024
SHAPES = [Shape(requests, SHARED + OWN, shared=SHARED) for requests in (1, 2, 3, 4, 8, 16, 32, 64)]
SHAPES += [Shape(32, SHARED + OWN, 28, 4, shared=SHARED)]


def measure(shape: Shape) -> list[dict[str, object]]:
    model = DecodeLayers(shape, num_layers(shape), values=True)
    steps = [functools.partial(model.select, index) for index in range(len(model.layers))]
    model.check()
    apart = time_layers(steps)
    found = [row("shared", "TokenSelect, each apart", shape, apart)]
    model.share()
    model.check()
    together = time_layers(steps)
    found.append(row("shared", "TokenSelect, shared once", shape, together, times=apart.median_us / together.median_us))
    found.append(row("shared", "  of it: shared tiles", shape, time_layers(shared_tiles(model))))
    found.append(row("shared", "dense FlashInfer decode", shape, time_layers(dense(model))))
    model.layers.clear()
    found.append(row("shared", "TokenSelect, shared once, all hits", shape, time_hits(shape, share=True)))
    return found


def shared_tiles(model: DecodeLayers) -> list:
    """The launches that are there for shared tiles alone, behind a step that voted."""
    model.select(0)
    (part,) = model.parts

    def score(layer) -> None:
        score_shared(
            layer.query,
            layer.keys,
            model.rows,
            part.shared,
            model.workspace,
            num_sink=WINDOW.num_sink,
        )

    return [functools.partial(score, layer) for layer in model.layers]
