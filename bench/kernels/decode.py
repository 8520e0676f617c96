# SPDX-License-Identifier: Apache-2.0
"""Decode: selection without and with hits beside dense attention, the paper's scheme and the keys' own time."""

from __future__ import annotations

import functools

import torch

from bench.kernels.layers import WINDOW, DecodeLayers, Shape
from bench.kernels.peers import flashinfer_decode
from bench.kernels.per_head import per_head_select
from bench.kernels.timing import Timing, time_layers
from sglang_tokenselect.kernels.decode_score import score_decode
from sglang_tokenselect.kernels.selection_cache import begin_decode
from sglang_tokenselect.kernels.vote import vote

AIM_SHAPES = [
    Shape(8, 131_072),
    Shape(32, 32_768),
    Shape(1, 1_048_576),
    Shape(1, 131_072),
    Shape(8, 131_072, 28, 4),
    Shape(32, 32_768, 28, 4),
    Shape(1, 131_072, 28, 4),
]
FIGURE_SHAPES = [Shape(1, 8_192), Shape(1, 32_768), Shape(1, 131_072), Shape(1, 524_288), Shape(1, 1_048_576)]
HIT_LAYERS = 32


def row(section: str, series: str, shape: Shape, timing: Timing, **more: object) -> dict[str, object]:
    times = {name: round(value, 2) for name, value in vars(timing).items()}
    return {"section": section, "series": series, **shape.columns, **times, **more}


def num_layers(shape: Shape) -> int:
    """Enough for 2 GB of keys, and two at least."""
    return min(max(2 * 10**9 // shape.key_bytes, 2), HIT_LAYERS)


def measure(shape: Shape, copy_tbs: float, *, is_figure: bool) -> list[dict[str, object]]:
    model = DecodeLayers(shape, num_layers(shape), values=True)
    model.check()
    stream = shape.key_bytes / copy_tbs / 1e6
    more = {"figure": "context"} if is_figure else {}
    found = [row("decode", "key stream (computed)", shape, Timing(stream, stream, stream), **more)]

    def add(series: str, timing: Timing) -> None:
        found.append(row("decode", series, shape, timing, of_key_stream=round(timing.median_us / stream, 3), **more))

    steps = [functools.partial(model.select, index) for index in range(len(model.layers))]
    add("TokenSelect, no hits", time_layers(steps))
    if not is_figure:
        for stage, launch in stages(model).items():
            found.append(row("decode", f"  of it: {stage}", shape, time_layers(launch)))
    add("dense FlashInfer decode", time_layers(dense(model)))
    if shape.requests == 1 or not is_figure:
        add("per-head scheme", time_layers(per_head(model)[:2], replays=5))
    model.layers.clear()
    add("TokenSelect, all hits", time_hits(shape))
    return found


def stages(model: DecodeLayers) -> dict[str, list]:
    """The launches of one selection apart. Of top-k, what it does to scores that are there: vote is part of it."""
    batch, rows, workspace, count = model.batch, model.rows, model.workspace, len(model.batch)
    ends = {"num_sink": WINDOW.num_sink, "num_local": WINDOW.num_local}

    def score(layer) -> None:
        score_decode(layer.query, layer.keys, batch.req_pool_indices, rows, workspace, num_sink=WINDOW.num_sink)

    def finish() -> None:
        vote(rows, count, workspace)
        model.emit(cache=model.caches[0], cache_slots=batch.cache_slots)

    return {
        "cache test": [
            lambda layer=layer, cache=cache: begin_decode(layer.query, batch, cache, rows, workspace, **ends)
            for layer, cache in zip(model.layers, model.caches, strict=True)
        ],
        "score": [lambda layer=layer: score(layer) for layer in model.layers],
        "vote + top-k + emit": [finish] * 4,
    }


def time_hits(shape: Shape, *, share: bool = False) -> Timing:
    """Every step is one token later than the step before, as in a server."""
    # A hit reads no keys: one layer's serve all.
    model = DecodeLayers(shape, HIT_LAYERS, share_keys=True)
    if share:
        model.share()
    for index in range(HIT_LAYERS):
        model.select(index)
    model.batch.theta.fill_(-1.0)

    def step(index: int) -> None:
        if index == 0:
            model.batch.seq_lens.add_(1)
        model.select(index)

    timing = time_layers([functools.partial(step, index) for index in range(HIT_LAYERS)], replays=20)
    hits, votes = sum(cache.counters for cache in model.caches).tolist()
    if votes != HIT_LAYERS * shape.requests or hits < 20 * votes:
        raise AssertionError(f"expected hits only, got {votes} votes and {hits} hits")
    return timing


def dense(model: DecodeLayers) -> list:
    n, count = model.shape.context, model.shape.requests
    kv_indptr = torch.arange(count + 1, dtype=torch.int32) * n
    return [
        flashinfer_decode(
            layer.query, layer.keys.pool, layer.values, kv_indptr, layer.table[:, :n].flatten().contiguous()
        )
        for layer in model.layers
    ]


def per_head(model: DecodeLayers) -> list:
    """The paper's scheme serves one request at a time."""
    sizes = {"num_sink": WINDOW.num_sink, "num_local": WINDOW.num_local, "budget": WINDOW.budget}

    def select(layer) -> None:
        for query, slots in zip(layer.query, layer.table, strict=True):
            per_head_select(query, layer.keys.pool, slots[: model.shape.context], **sizes)

    return [lambda layer=layer: select(layer) for layer in model.layers]
