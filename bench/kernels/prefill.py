# SPDX-License-Identifier: Apache-2.0
"""Prefill: selection for the blocks of one chunk beside dense attention of the same chunk.

The chunk is the end of one request, or of many that go on after one prefix.
"""

from __future__ import annotations

import torch

from bench.kernels.decode import row
from bench.kernels.layers import DTYPE, HEAD_DIM, WINDOW, Layer, Shape, check_votes
from bench.kernels.peers import flashinfer_prefill
from bench.kernels.timing import time_eager
from sglang_tokenselect.kernels.block_plan import BlockScratch, count_rows_per_block
from sglang_tokenselect.kernels.reference.prefill import mean_queries
from sglang_tokenselect.kernels.select_blocks import PrefillBlock, PrefillPlan, plan_prefill, select_blocks
from sglang_tokenselect.kernels.shared_segment import SharedSegment
from sglang_tokenselect.kernels.workspace import Workspace, WorkspaceLimits

CHUNK = 8_192
BLOCK = 128
SUB_BLOCKS = (16, 32, 64, 128)
BRANCHES = Shape(32, 65_536 + CHUNK // 32, shared=65_536)
SHAPES = [Shape(1, 32_768), Shape(1, 131_072), Shape(1, 262_144), Shape(1, 131_072, 28, 4)]
DENSE_REPEATS = 5  # up to 0.1 s each


class Chunk:
    """The last 8,192 queries of a request of ``shape.context`` tokens; of several requests, as many of each."""

    def __init__(self, shape: Shape) -> None:
        self.shape, self.layer = shape, Layer(shape, values=True, num_queries=CHUNK)
        own = CHUNK // shape.requests
        start = shape.context - own
        self.shared = [SharedSegment(tuple(range(shape.requests)), 0, shape.shared)] if shape.shared else []
        self.blocks = [
            PrefillBlock(request, s, s + BLOCK, request * own + s - start, WINDOW.budget)
            for request in range(shape.requests)
            for s in range(start, shape.context, BLOCK)
        ]
        limits = WorkspaceLimits(len(self.blocks), len(self.blocks) * shape.context, shape.context, WINDOW.budget)
        self.workspace = Workspace(limits, "cuda")
        most = len(self.blocks) * max(BLOCK // sub_block for sub_block in SUB_BLOCKS)
        self.scratch = BlockScratch.allocate(most, shape.num_qo_heads, "cuda")
        self.means = torch.empty(most, shape.num_qo_heads, HEAD_DIM, device="cuda", dtype=DTYPE)
        self.kv_indices = torch.empty(len(self.blocks) * (WINDOW.size + BLOCK), device="cuda", dtype=torch.int32)

    def plan(self, sub_block: int, *, shares: bool) -> PrefillPlan:
        return plan_prefill(
            self.blocks,
            self.workspace.limits,
            block=BLOCK,
            sub_block=sub_block,
            num_sink=WINDOW.num_sink,
            num_local=WINDOW.num_local,
            num_qo_heads=self.shape.num_qo_heads,
            device="cuda",
            shared=self.shared if shares else (),
        )

    def select(self, plan: PrefillPlan) -> None:
        select_blocks(
            self.layer.query,
            self.layer.keys,
            plan,
            self.workspace,
            self.scratch,
            self.means,
            self.kv_indices,
            vote_scale=1.0,
            combine="max",
        )

    def check(self, plan: PrefillPlan) -> None:
        """Raises unless the first and the last block select what float64 does with their rounded means."""
        self.select(plan)
        position_of = torch.empty(self.shape.num_slots, device="cuda", dtype=torch.int32)
        slots = self.kv_indices.view(len(self.blocks), -1)
        for index in (0, len(self.blocks) - 1):
            block = self.blocks[index]
            owned = self.layer.table[block.req_pool_idx].long()
            position_of[owned] = torch.arange(len(owned), device="cuda", dtype=torch.int32)
            query = self.layer.query[block.first_query : block.first_query + BLOCK]
            means = mean_queries(query, block.start, plan.sub_block).to(DTYPE)
            candidates = slice(WINDOW.num_sink, block.start - WINDOW.num_local)
            check_votes(self.layer, block.req_pool_idx, candidates, means, position_of[slots[index].long()], rtol=0.002)


def measure(shape: Shape) -> list[dict[str, object]]:
    chunk = Chunk(shape)
    about = {"setting": f"chunk {CHUNK}, block {BLOCK}"}
    found = []
    for sub_block in SUB_BLOCKS:
        if sub_block != SUB_BLOCKS[0] and (chunk.shared or shape.context == 262_144):
            continue
        rows = count_rows_per_block(BLOCK, sub_block)
        for shares in [True, False] if chunk.shared else [False]:
            plan = chunk.plan(sub_block, shares=shares)
            chunk.check(plan)
            timing = time_eager(lambda plan=plan: chunk.select(plan))
            together = ", shared keys read together" if shares else ""
            series = f"TokenSelect block selection, sub_block {sub_block} ({rows} rows){together}"
            found.append(row("prefill", series, shape, timing, **about))
    slots = chunk.layer.table[:, : shape.context].flatten()
    each = torch.arange(shape.requests + 1, dtype=torch.int32)
    qo_indptr = torch.arange(len(chunk.blocks) + 1, dtype=torch.int32) * BLOCK
    attended = qo_indptr * (WINDOW.size // BLOCK) + qo_indptr
    values = (chunk.layer.query, chunk.layer.keys.pool, chunk.layer.values)
    for backend in ("fa2", "fa3"):
        dense = flashinfer_prefill(
            *values, each * shape.context, slots, qo_indptr=each * (CHUNK // shape.requests), backend=backend
        )
        sparse = flashinfer_prefill(*values, attended, chunk.kv_indices, qo_indptr=qo_indptr, backend=backend)
        if dense is None or sparse is None:
            continue
        found.append(
            row("prefill", f"dense attention, {backend}", shape, time_eager(dense, repeats=DENSE_REPEATS), **about)
        )
        found.append(row("prefill", f"attention over the selection, {backend}", shape, time_eager(sparse), **about))
    return found
