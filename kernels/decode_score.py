# SPDX-License-Identifier: Apache-2.0
"""Logits of one query per row against its paged keys (paper, section 3.2), as per-tile softmax terms.

The keys are read once, by all query heads of their group together, on the tensor cores. What is kept of a
logit is ``exp2(logit - max of its subtile)`` in bfloat16, which has the same relative error everywhere (2**-9);
float16 logits would lose the small and the large ones.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import start_next, wait_for_previous
from .paged_keys import PagedKeys
from .rows import SelectionRows, row_tiles, rows_block
from .workspace import LEAST, SUBTILE, TILE, DecodeWorkspace


# Of a part of the rows, what begins at its first row is not aligned alike.
@triton.jit(
    do_not_specialize=["num_rows"],
    do_not_specialize_on_alignment=["req_pool_indices_ptr", "num_candidates_ptr", "shared_tiles_ptr"],
)
def _decode_score_kernel(
    query_ptr,
    key_ptr,
    req_to_token_ptr,
    req_pool_indices_ptr,
    num_candidates_ptr,
    shared_tiles_ptr,
    terms_ptr,
    subtile_max_ptr,
    partial_max_ptr,
    partial_sum_ptr,
    partition_ptr,
    num_rows,
    num_sink,
    logit_scale,
    stride_query_row,
    stride_key_slot,
    stride_table_row,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr,
    SUBTILE: tl.constexpr,
    LEAST: tl.constexpr,
    ROWS: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    if shared_tiles_ptr is None:
        wait_for_previous(PDL)
        start_next(PDL)
    # The rows' own tiles, in order of row, are cut in as many runs as there are programs for each KV head.
    # Programs of all heads walk through the same tokens at the same time: a token's keys are neighbours in memory.
    rows = tl.arange(0, ROWS)
    row_start, row_end = row_tiles(num_candidates_ptr, shared_tiles_ptr, num_rows, ROWS, TILE)
    end = tl.max(row_end)
    head = tl.program_id(0) % NUM_KV_HEADS
    run = tl.program_id(0) // NUM_KV_HEADS
    tiles_per_run = tl.maximum(tl.cdiv(end, tl.num_programs(0) // NUM_KV_HEADS), 1)
    if tl.program_id(0) == 0:
        tl.store(partition_ptr, tiles_per_run)

    lanes = tl.arange(0, TILE)
    dims = tl.arange(0, HEAD_DIM)
    group = tl.arange(0, GROUP_BLOCK)
    subtiles = tl.arange(0, TILE // SUBTILE)
    is_head = group[:, None] < GROUP
    first = run * tiles_per_run
    stop = tl.minimum(first + tiles_per_run, end)
    while first < stop:
        row = tl.sum(((rows < num_rows) & (row_end <= first)).to(tl.int32))
        start = tl.sum(tl.where(rows == row, row_start, 0))
        last = tl.minimum(stop, tl.sum(tl.where(rows == row, row_end, 0)))
        num_candidates = tl.load(num_candidates_ptr + row)
        if shared_tiles_ptr is not None:
            start -= tl.load(shared_tiles_ptr + row)  # where the row's first tile would be
        req = tl.load(req_pool_indices_ptr + row).to(tl.int64)
        slots_ptr = req_to_token_ptr + req * stride_table_row + num_sink
        keys_ptr = key_ptr + head * HEAD_DIM + dims[None, :]
        # [GROUP_BLOCK, HEAD_DIM]
        query_heads = (head * GROUP + group[:, None]) * HEAD_DIM
        query = tl.load(
            query_ptr + row.to(tl.int64) * stride_query_row + query_heads + dims[None, :], mask=is_head, other=0
        )
        # [GROUP_BLOCK, TILE // SUBTILE]: lanes that no warp shares until the run is over.
        running_max = tl.full([GROUP_BLOCK, TILE // SUBTILE], LEAST, tl.float32)
        running_sum = tl.zeros([GROUP_BLOCK, TILE // SUBTILE], tl.float32)
        for tile in tl.range(first, last, num_stages=NUM_STAGES):
            candidates = (tile - start) * TILE + lanes
            # Lanes past the end read slot 0, which exists, and are masked below.
            slots = tl.load(slots_ptr + candidates, mask=candidates < num_candidates, other=0).to(tl.int64)
            # [TILE, HEAD_DIM]
            keys = tl.load(keys_ptr + slots[:, None] * stride_key_slot).to(query.dtype)
            # [GROUP_BLOCK, TILE]
            logits = tl.dot(query, keys.T) * logit_scale
            logits = tl.where(candidates[None, :] < num_candidates, logits, -float("inf"))
            # [GROUP_BLOCK, TILE // SUBTILE, SUBTILE]
            logits = tl.reshape(logits, (GROUP_BLOCK, TILE // SUBTILE, SUBTILE))
            subtile_max = tl.maximum(tl.max(logits, 2), LEAST)
            terms = tl.exp2(logits - subtile_max[:, :, None])
            new_max = tl.maximum(running_max, subtile_max)
            running_sum *= tl.exp2(running_max - new_max)
            running_sum += tl.sum(terms, 2) * tl.exp2(subtile_max - new_max)
            running_max = new_max
            out = tile * (NUM_KV_HEADS * GROUP) + head.to(tl.int64) * GROUP + group[:, None]
            tl.store(subtile_max_ptr + out * (TILE // SUBTILE) + subtiles[None, :], subtile_max, mask=is_head)
            terms = tl.reshape(terms, (GROUP_BLOCK, TILE)).to(terms_ptr.dtype.element_ty)
            tl.store(terms_ptr + out * TILE + lanes[None, :], terms, mask=is_head)
        total_max = tl.max(running_max, 1)
        total_sum = tl.sum(running_sum * tl.exp2(running_max - total_max[:, None]), 1)
        # Runs ascend, and so do the rows of a run: their sum names this piece alone.
        partial = (run + row) * (NUM_KV_HEADS * GROUP) + head * GROUP + group
        tl.store(partial_max_ptr + partial, total_max, mask=group < GROUP)
        tl.store(partial_sum_ptr + partial, total_sum, mask=group < GROUP)
        first = last
    if shared_tiles_ptr is not None:
        # The launch before this one was :func:`plan_chunks`, of which nothing is read here.
        wait_for_previous(PDL)
        start_next(PDL)


def score_decode(
    query: torch.Tensor,
    keys: PagedKeys,
    req_pool_indices: torch.Tensor,
    rows: SelectionRows,
    workspace: DecodeWorkspace,
    *,
    num_sink: int,
    vote_scale: float = 1.0,
    shared_tiles: torch.Tensor | None = None,
) -> None:
    """Scores what each row scores by itself: fills the workspace's softmax terms for :func:`vote`.

    Args:
        query: [num_rows, num_qo_heads, head_dim] bfloat16 or float16, heads contiguous.
        req_pool_indices: [num_rows] int32 or int64.
        vote_scale: factor of the logits, which are *not* divided by sqrt(head_dim).
        shared_tiles: [num_rows] int32, tiles at the front of each row that :func:`score_shared` scores, and then
            :func:`plan_chunks` must be the launch before this one; None: none.
    """
    num_rows, num_qo_heads, head_dim = query.shape
    group = num_qo_heads // keys.num_kv_heads
    _decode_score_kernel[(workspace.score_programs,)](
        query,
        keys.pool,
        keys.req_to_token,
        req_pool_indices,
        rows.num_candidates,
        shared_tiles,
        workspace.terms,
        workspace.subtile_max,
        workspace.partial_max,
        workspace.partial_sum,
        workspace.partition,
        num_rows,
        num_sink,
        keys.logit_scale(vote_scale),
        query.stride(0),
        keys.pool.stride(0),
        keys.req_to_token.stride(0),
        NUM_KV_HEADS=keys.num_kv_heads,
        GROUP=group,
        GROUP_BLOCK=max(16, triton.next_power_of_2(group)),
        HEAD_DIM=head_dim,
        TILE=TILE,
        SUBTILE=SUBTILE,
        LEAST=LEAST,
        ROWS=rows_block(num_rows),
        NUM_STAGES=7,
        PDL=workspace.pdl,
        launch_pdl=workspace.pdl,
        num_warps=4,
    )
