# SPDX-License-Identifier: Apache-2.0
"""Compact positions: FlashInfer rotates keys in its kernels (ROPE_LLAMA), beside the cost of rotated copies.

Copies need the chosen keys and values gathered for each list, since FlashInfer reads both by the same slots; the
gathers alone are timed, without a rotation. They are also measured in memory: `copied_mb`.
"""

from __future__ import annotations

import torch

from bench.kernels.decode import row
from bench.kernels.layers import DTYPE, HEAD_DIM, WINDOW, Shape
from bench.kernels.timing import time_eager, time_layers
from sglang_tokenselect.flashinfer_attention import AttentionSpec, DecodeAttention, PrefillAttention
from sglang_tokenselect.gpu_buffers import INT_WORKSPACE_BYTES
from sglang_tokenselect.model_shape import ModelShape
from sglang_tokenselect.runner import LayerInput
from sglang_tokenselect.slot_lists import SlotLists

SHAPES = [Shape(1, 131_072), Shape(8, 32_768)]
CHUNK, BLOCK = 8_192, 128
THETA = 5e5
WORKSPACE_BYTES = 384 * 2**20
DECODE_LAYERS = 8


def _lists(num_lists: int, length: int, num_slots: int) -> SlotLists:
    kv_indptr = torch.arange(num_lists + 1, dtype=torch.int32) * length
    slots = torch.randint(num_slots, (num_lists * length,), dtype=torch.int32, device="cuda")
    return SlotLists(kv_indptr.cuda(), kv_indptr, slots)


def _spec(shape: Shape, rope_theta: float | None) -> AttentionSpec:
    model = ModelShape(1, shape.num_qo_heads, shape.num_kv_heads, HEAD_DIM, DTYPE, DTYPE, shape.context)
    return AttentionSpec(model, rope_theta=rope_theta)


def _layer(pools: torch.Tensor) -> LayerInput:
    return LayerInput(0, pools[0], pools[1], scaling=HEAD_DIM**-0.5, logit_cap=0.0)


def measure(shape: Shape) -> list[dict[str, object]]:
    """A decode step of the shape's requests, and a prefill chunk of one of them."""
    num_slots = shape.requests * shape.context
    pools = torch.randn(2, num_slots, shape.num_kv_heads, HEAD_DIM, device="cuda", dtype=DTYPE)
    return [*_measure_decode(shape, pools), *_measure_prefill(shape, pools)]


def _measure_decode(shape: Shape, pools: torch.Tensor) -> list[dict[str, object]]:
    found = []
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
    query = torch.randn(shape.requests, shape.num_qo_heads, HEAD_DIM, device="cuda", dtype=DTYPE)
    lists = [_lists(shape.requests, WINDOW.size, pools.shape[1]) for _ in range(DECODE_LAYERS)]
    for name, theta in (("absolute", None), ("compact, rotated by FlashInfer", THETA)):
        attentions = []
        for item in lists:
            int_workspace = torch.empty(INT_WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
            attention = DecodeAttention(_spec(shape, theta), workspace, int_workspace, shape.requests)
            attention.plan_capture(item)
            attentions.append(attention)
        steps = [lambda a=a: a.run(query, _layer(pools)) for a in attentions]
        found.append(row("positions", f"decode attention over the selection, {name}", shape, time_layers(steps)))
    found.append(_copies("decode", shape, pools, lists[0]))
    return found


def _measure_prefill(shape: Shape, pools: torch.Tensor) -> list[dict[str, object]]:
    found, about = [], {"setting": f"chunk {CHUNK}, block {BLOCK}"}
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device="cuda")
    query = torch.randn(CHUNK, shape.num_qo_heads, HEAD_DIM, device="cuda", dtype=DTYPE)
    qo_indptr = torch.arange(CHUNK // BLOCK + 1, dtype=torch.int32) * BLOCK
    lists = _lists(CHUNK // BLOCK, WINDOW.size + BLOCK, pools.shape[1])
    for name, theta in (("absolute (fa3)", None), ("compact, rotated by FlashInfer (fa2)", THETA)):
        attention = PrefillAttention(_spec(shape, theta), workspace)
        attention.plan(qo_indptr, lists)
        timing = time_eager(lambda a=attention: a.run(query, _layer(pools)))
        found.append(row("positions", f"prefill attention over the selection, {name}", shape, timing, **about))
    return [*found, _copies("prefill", shape, pools, lists, **about)]


def _copies(phase: str, shape: Shape, pools: torch.Tensor, lists: SlotLists, **about: str) -> dict[str, object]:
    slots = lists.kv_indices.long()
    copies = torch.empty(2, len(slots), *pools.shape[2:], device="cuda", dtype=DTYPE)

    def gather() -> None:
        for pool, copy in zip(pools, copies, strict=True):
            torch.index_select(pool, 0, slots, out=copy)

    copied = f"{copies.numel() * copies.element_size() / 1e6:.0f}"
    return row(
        "positions", f"{phase}, gathers of keys and values", shape, time_eager(gather), **about, copied_mb=copied
    )
