# SPDX-License-Identifier: Apache-2.0
"""Top-k of given scores to slots: ours beside those that exist."""

from __future__ import annotations

import torch

from bench.kernels.decode import row
from bench.kernels.layers import WINDOW, DecodeLayers, Shape
from bench.kernels.peers import flashinfer_topk, flashinfer_topk_page_table, sgl_fast_topk, torch_topk
from bench.kernels.timing import time_layers
from sglang_tokenselect.kernels.vote import take_scores

SHAPES = [Shape(1, 32_768), Shape(1, 131_072), Shape(8, 131_072), Shape(32, 32_768), Shape(1, 1_048_576)]
REPEATS = 8  # calls in a graph: scores are in L2 in all but the first, as they are behind a vote


def measure(shape: Shape) -> list[dict[str, object]]:
    model = DecodeLayers(shape, 1)
    model.check()
    rows, workspace, count = model.rows, model.workspace, shape.requests
    table = model.layers[0].table
    candidates = int(rows.num_candidates[0])
    tiles = -(-candidates // workspace.scores.shape[1])
    scores = workspace.scores[: count * tiles].view(count, -1)[:, :candidates].contiguous()
    expected = model.kv_indices.clone()

    def ours() -> None:
        take_scores(rows, count, workspace)
        model.emit()

    ours()
    if not torch.equal(model.kv_indices, expected):
        raise AssertionError(f"{shape}: top-k of the scores differs from the selection that made them")
    lengths = torch.full((count,), candidates, device="cuda", dtype=torch.int32)
    # FlashInfer takes no part of a wider table: its pages are those of the candidates.
    pages = table[:, WINDOW.num_sink : WINDOW.num_sink + candidates].contiguous()
    order = torch.arange(count, device="cuda", dtype=torch.int32)
    peers = {
        "TokenSelect top-k + emit": ours,
        "torch.topk": torch_topk(scores, WINDOW.budget),
        "flashinfer.top_k": flashinfer_topk(scores, WINDOW.budget),
        "flashinfer page table, tie order": flashinfer_topk_page_table(scores, pages, lengths, WINDOW.budget, order),
        "flashinfer page table, defaults": flashinfer_topk_page_table(
            scores, pages, lengths, WINDOW.budget, order, deterministic=False
        ),
        "sgl_kernel fast_topk_v2": sgl_fast_topk(scores, lengths),
    }
    ordered = peers["flashinfer page table, tie order"]
    if ordered is not None and not torch.equal(
        ordered().view(count, -1), expected.view(count, -1)[:, WINDOW.num_sink : WINDOW.num_sink + WINDOW.budget]
    ):
        print(f"note: {shape}: FlashInfer's slots differ from ours")
    return [row("top-k", name, shape, time_layers([step] * REPEATS)) for name, step in peers.items() if step]
