# SPDX-License-Identifier: Apache-2.0
"""Scores of a prefix that several decode requests share: its keys are loaded once for all who vote.

Two passes over the keys, as in prefill: the first makes the log-sum-exp of each row and head, the second computes the
logits again and adds up the votes of the query heads of each KV head in registers. So the softmax terms of all heads do
not travel through memory, which for many rows would take longer than the dots. Rows that reuse a vote are left out: who
votes is known on the device only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import start_next, wait_for_previous
from .paged_keys import PagedKeys
from .rows import SelectionRows, first_own_tile_of, first_tile_of, rows_block
from .shared_plan import SharedPrefixes
from .shared_segment import MAX_SEGMENTS
from .vote import finish_log_sum_exp, fold_own_tiles, fold_partials
from .workspace import CHUNK_FIELDS, LEAST, TILE, DecodeWorkspace

LANES = 64
"""Members of a segment, chunks or runs that a program looks at at once."""

PARTIALS = 16
"""Pieces of a log-sum-exp that a program folds at once."""


@triton.jit(
    do_not_specialize_on_alignment=["num_candidates_ptr", "req_pool_indices_ptr"],
)
def _plan_chunks_kernel(
    num_candidates_ptr,
    req_pool_indices_ptr,
    members_ptr,
    indptr_ptr,
    tiles_ptr,
    voters_ptr,
    num_voters_ptr,
    first_chunk_ptr,
    chunks_ptr,
    run_chunk_ptr,
    num_units_ptr,
    arrivals_ptr,
    num_runs,
    CHUNK: tl.constexpr,
    FIELDS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    LANES: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    start_next(PDL)
    # Each program gathers the voters of a segment.
    segment = tl.program_id(0)
    lanes = tl.arange(0, LANES)
    begin = tl.load(indptr_ptr + segment)
    end = tl.load(indptr_ptr + segment + 1)
    count = 0
    for offset in range(begin, end, LANES):
        rows = tl.load(members_ptr + offset + lanes, mask=offset + lanes < end, other=0)
        votes = tl.load(num_candidates_ptr + rows, mask=offset + lanes < end, other=0) > 0
        tl.store(voters_ptr + begin + count + tl.cumsum(votes.to(tl.int32)) - 1, rows, mask=votes)
        count += tl.sum(votes.to(tl.int32))
    tl.store(num_voters_ptr + segment, count)
    tl.debug_barrier()
    if tl.atomic_add(arrivals_ptr, 1, sem="acq_rel") == SEGMENTS - 1:
        tl.store(arrivals_ptr, 0)
        # The last one cuts them in chunks of up to CHUNK voters. A unit of work is a tile for a chunk. [SEGMENTS]
        segments = tl.arange(0, SEGMENTS)
        voters = tl.load(num_voters_ptr + segments, cache_modifier=".cg")
        first_voter = tl.load(indptr_ptr + segments)
        first_tile = tl.load(tiles_ptr + segments)
        num_tiles = tl.load(tiles_ptr + SEGMENTS + segments) - first_tile
        num_chunks = tl.cdiv(voters, CHUNK)
        chunk_end = tl.cumsum(num_chunks)
        first_chunk = chunk_end - num_chunks
        unit_end = tl.cumsum(num_chunks * num_tiles)
        first_unit = unit_end - num_chunks * num_tiles
        tl.store(first_chunk_ptr + segments, first_chunk)
        for offset in range(0, tl.max(chunk_end), LANES):
            chunk = offset + lanes
            # [LANES, SEGMENTS]
            mine = (tl.sum((chunk_end[None, :] <= chunk[:, None]).to(tl.int32), 1)[:, None]) == segments[None, :]
            inside = chunk < tl.max(chunk_end)
            index = chunk - _pick(mine, first_chunk)
            leader = tl.load(voters_ptr + _pick(mine, first_voter), mask=inside, other=0, cache_modifier=".cg")
            tiles = _pick(mine, num_tiles)
            fields_ptr = chunks_ptr + chunk * FIELDS
            tl.store(fields_ptr, _pick(mine, first_voter) + index * CHUNK, mask=inside)
            tl.store(fields_ptr + 1, tl.minimum(_pick(mine, voters) - index * CHUNK, CHUNK), mask=inside)
            tl.store(
                fields_ptr + 2, tl.load(req_pool_indices_ptr + leader, mask=inside, other=0).to(tl.int32), mask=inside
            )
            tl.store(fields_ptr + 3, _pick(mine, first_tile), mask=inside)
            tl.store(fields_ptr + 4, tiles, mask=inside)
            tl.store(fields_ptr + 5, _pick(mine, first_unit) + index * tiles, mask=inside)
        # All units, in order, are cut in runs of equal length.
        num_units = tl.max(unit_end)
        run_units = tl.maximum(tl.cdiv(num_units, num_runs), 1)
        tl.store(num_units_ptr, num_units)
        tl.store(num_units_ptr + 1, run_units)
        for offset in range(0, num_runs, LANES):
            unit = (offset + lanes) * run_units
            mine = (tl.sum((unit_end[None, :] <= unit[:, None]).to(tl.int32), 1)[:, None]) == segments[None, :]
            chunk = _pick(mine, first_chunk) + (unit - _pick(mine, first_unit)) // tl.maximum(_pick(mine, num_tiles), 1)
            tl.store(run_chunk_ptr + offset + lanes, chunk, mask=offset + lanes < num_runs)


@triton.jit
def _pick(mine, values):
    """The value of each lane's segment: [LANES]."""
    return tl.sum(tl.where(mine, values[None, :], 0), 1)


@triton.jit
def _chunk(chunks_ptr, chunk, FIELDS: tl.constexpr):
    """Of a chunk: its first voter, voters, the row of `req_to_token` to read by, first tile, tiles, and first unit."""
    fields_ptr = chunks_ptr + chunk * FIELDS
    return (
        tl.load(fields_ptr, cache_modifier=".cg"),
        tl.load(fields_ptr + 1, cache_modifier=".cg"),
        tl.load(fields_ptr + 2, cache_modifier=".cg"),
        tl.load(fields_ptr + 3, cache_modifier=".cg"),
        tl.load(fields_ptr + 4, cache_modifier=".cg"),
        tl.load(fields_ptr + 5, cache_modifier=".cg"),
    )


@triton.jit
def _run(run, run_chunk_ptr, num_units_ptr):
    """The units [first, stop) of a run, and the chunk of the first one."""
    num_units = tl.load(num_units_ptr, cache_modifier=".cg")
    run_units = tl.load(num_units_ptr + 1, cache_modifier=".cg")
    first = run * run_units
    return first, tl.minimum(first + run_units, num_units), tl.load(run_chunk_ptr + run, cache_modifier=".cg")


@triton.jit
def _load_queries(query_ptr, rows, heads, is_query, stride_query_row, HEAD_DIM: tl.constexpr):
    """Queries of pairs of row and head, zeros where there is none: [len(rows), HEAD_DIM]."""
    offs = rows.to(tl.int64) * stride_query_row + heads * HEAD_DIM
    return tl.load(query_ptr + offs[:, None] + tl.arange(0, HEAD_DIM)[None, :], mask=is_query[:, None], other=0)


@triton.jit
def _shared_logsumexp_kernel(
    query_ptr,
    key_ptr,
    req_to_token_ptr,
    voters_ptr,
    chunks_ptr,
    run_chunk_ptr,
    num_units_ptr,
    partial_max_ptr,
    partial_sum_ptr,
    num_sink,
    logit_scale,
    stride_query_row,
    stride_key_slot,
    stride_table_row,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr,
    FIELDS: tl.constexpr,
    LEAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    # The plan was there before the launch before this one, and nothing of that is read. So the two may overlap.
    start_next(PDL)
    # As in decode_score.py, programs of all heads walk through the same tokens at the same time.
    kv_head = tl.program_id(0) % NUM_KV_HEADS
    run = tl.program_id(0) // NUM_KV_HEADS
    first, stop, chunk = _run(run, run_chunk_ptr, num_units_ptr)
    # [CHUNK * GROUP_BLOCK]: a row's heads are neighbours.
    pairs = tl.arange(0, CHUNK * GROUP_BLOCK)
    in_group = pairs % GROUP_BLOCK
    while first < stop:
        first_voter, num_voters, req, first_tile, num_tiles, first_unit = _chunk(chunks_ptr, chunk, FIELDS)
        tile = first_tile + first - first_unit
        count = tl.minimum(stop - first, num_tiles - (first - first_unit))
        member = pairs // GROUP_BLOCK
        is_query = (member < num_voters) & (in_group < GROUP)
        rows = tl.load(voters_ptr + first_voter + member, mask=is_query, other=0, cache_modifier=".cg")
        # [CHUNK * GROUP_BLOCK, HEAD_DIM]
        query = _load_queries(query_ptr, rows, kv_head * GROUP + in_group, is_query, stride_query_row, HEAD_DIM)
        slots_ptr = (
            req_to_token_ptr + req.to(tl.int64) * stride_table_row + num_sink + tile * TILE + tl.arange(0, BLOCK_N)
        )
        keys_ptr = key_ptr + kv_head * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
        top = tl.full([CHUNK * GROUP_BLOCK], LEAST, tl.float32)
        total = tl.zeros([CHUNK * GROUP_BLOCK], tl.float32)
        for offset in tl.range(0, count * TILE, BLOCK_N, num_stages=NUM_STAGES):
            slots = tl.load(slots_ptr + offset).to(tl.int64)
            # [BLOCK_N, HEAD_DIM]
            keys = tl.load(keys_ptr + slots[:, None] * stride_key_slot).to(query.dtype)
            # [CHUNK * GROUP_BLOCK, BLOCK_N]
            dots = tl.dot(query, keys.T)
            new_top = tl.maximum(top, tl.max(dots, 1) * logit_scale)
            total = total * tl.exp2(top - new_top) + tl.sum(tl.exp2(dots * logit_scale - new_top[:, None]), 1)
            top = new_top
        # Runs ascend, and so do the chunks of a run: their sum names this piece alone.
        offs = ((run + chunk) * CHUNK + member) * (NUM_KV_HEADS * GROUP) + kv_head * GROUP + in_group
        tl.store(partial_max_ptr + offs, top, mask=is_query)
        tl.store(partial_sum_ptr + offs, total, mask=is_query)
        first += count
        chunk += 1
    wait_for_previous(PDL)


@triton.jit
def _rank_of(row, voters_ptr, num_voters, LANES: tl.constexpr):
    """Where a row is among the voters of a segment."""
    rank = 0
    for offset in range(0, num_voters, LANES):
        index = offset + tl.arange(0, LANES)
        voters = tl.load(voters_ptr + index, mask=index < num_voters, other=-1)
        rank += tl.sum(tl.where(voters == row, index, 0))
    return rank


@triton.jit(do_not_specialize_on_alignment=["num_candidates_ptr", "shared_tiles_ptr", "segment_ptr"])
def _combine_kernel(
    num_candidates_ptr,
    shared_tiles_ptr,
    segment_ptr,
    parent_ptr,
    indptr_ptr,
    voters_ptr,
    num_voters_ptr,
    first_chunk_ptr,
    chunks_ptr,
    num_units_ptr,
    own_max_ptr,
    own_sum_ptr,
    own_partition_ptr,
    partial_max_ptr,
    partial_sum_ptr,
    lse_ptr,
    first_tile_ptr,
    NUM_HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    FIELDS: tl.constexpr,
    TILE: tl.constexpr,
    LANES: tl.constexpr,
    PARTIALS: tl.constexpr,
    LEAST: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(0)
    num_candidates = tl.load(num_candidates_ptr + row, cache_modifier=".cg")
    shared_tiles = tl.load(shared_tiles_ptr + row)
    start = first_own_tile_of(row, num_candidates_ptr, shared_tiles_ptr, ROWS, TILE)
    first_tile = first_tile_of(row, num_candidates_ptr, ROWS, TILE)
    segment = tl.load(segment_ptr + row)
    run_units = tl.load(num_units_ptr + 1, cache_modifier=".cg")
    wait_for_previous(PDL)
    start_next(PDL)
    if num_candidates > 0:
        num_own = tl.cdiv(num_candidates, TILE) - shared_tiles
        top, total = fold_own_tiles(
            own_max_ptr, own_sum_ptr, own_partition_ptr, row, start, num_own, NUM_HEADS, HEADS_BLOCK, PARTIALS, LEAST
        )
        while segment >= 0:
            voters_of_ptr = voters_ptr + tl.load(indptr_ptr + segment)
            rank = _rank_of(row, voters_of_ptr, tl.load(num_voters_ptr + segment), LANES)
            chunk = tl.load(first_chunk_ptr + segment) + rank // CHUNK
            _, _, _, _, num_tiles, first_unit = _chunk(chunks_ptr, chunk, FIELDS)
            top, total = fold_partials(
                top,
                total,
                partial_max_ptr + (rank % CHUNK) * NUM_HEADS,
                partial_sum_ptr + (rank % CHUNK) * NUM_HEADS,
                first_unit // run_units + chunk,
                (first_unit + num_tiles - 1) // run_units + chunk,
                CHUNK * NUM_HEADS,
                NUM_HEADS,
                HEADS_BLOCK,
                PARTIALS,
                LEAST,
            )
            segment = tl.load(parent_ptr + segment)
        heads = tl.arange(0, HEADS_BLOCK)
        lse = finish_log_sum_exp(top, total, NUM_HEADS, HEADS_BLOCK)
        tl.store(lse_ptr + row * NUM_HEADS + heads, lse, mask=heads < NUM_HEADS)
        tl.store(first_tile_ptr + row, first_tile)


@triton.jit
def _shared_votes_kernel(
    query_ptr,
    key_ptr,
    req_to_token_ptr,
    voters_ptr,
    chunks_ptr,
    run_chunk_ptr,
    num_units_ptr,
    lse_ptr,
    first_tile_ptr,
    head_scores_ptr,
    num_sink,
    logit_scale,
    stride_query_row,
    stride_key_slot,
    stride_table_row,
    stride_scores_head,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr,
    FIELDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    NUM_STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    start_next(PDL)
    kv_head = tl.program_id(0) % NUM_KV_HEADS
    run = tl.program_id(0) // NUM_KV_HEADS
    first, stop, chunk = _run(run, run_chunk_ptr, num_units_ptr)
    # All above was there before the launch before this one; the log-sum-exp was not.
    wait_for_previous(PDL)
    head_scores_ptr += kv_head.to(tl.int64) * stride_scores_head
    # [GROUP_BLOCK * CHUNK]: heads are the slower, so that the votes of a row's heads meet in the registers of a thread.
    pairs = tl.arange(0, GROUP_BLOCK * CHUNK)
    heads = kv_head * GROUP + pairs // CHUNK
    lanes = tl.arange(0, BLOCK_N)
    while first < stop:
        first_voter, num_voters, req, first_tile, num_tiles, first_unit = _chunk(chunks_ptr, chunk, FIELDS)
        begin = (first_tile + first - first_unit) * TILE
        num_tokens = tl.minimum(stop - first, num_tiles - (first - first_unit)) * TILE
        is_query = (pairs % CHUNK < num_voters) & (pairs // CHUNK < GROUP)
        rows = tl.load(voters_ptr + first_voter + pairs % CHUNK, mask=is_query, other=0)
        # [GROUP_BLOCK * CHUNK, HEAD_DIM]
        query = _load_queries(query_ptr, rows, heads, is_query, stride_query_row, HEAD_DIM)
        # Queries that are not there: dots of 0 less infinity.
        lse = tl.load(lse_ptr + rows * (NUM_KV_HEADS * GROUP) + heads, mask=is_query, other=float("inf"))
        slots_ptr = req_to_token_ptr + req.to(tl.int64) * stride_table_row + num_sink + begin
        keys_ptr = key_ptr + kv_head * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
        is_row = tl.arange(0, CHUNK) < num_voters
        out_rows = tl.load(voters_ptr + first_voter + tl.arange(0, CHUNK), mask=is_row, other=0)
        out = tl.load(first_tile_ptr + out_rows, mask=is_row, other=0).to(tl.int64) * TILE + begin
        # From the last to the first: what the first pass read last may still be in L2.
        for offset in tl.range(0, num_tokens, BLOCK_N, num_stages=NUM_STAGES):
            tokens = num_tokens - BLOCK_N - offset + lanes
            slots = tl.load(slots_ptr + tokens).to(tl.int64)
            # [BLOCK_N, HEAD_DIM]
            keys = tl.load(keys_ptr + slots[:, None] * stride_key_slot).to(query.dtype)
            # [BLOCK_N, GROUP_BLOCK * CHUNK]
            votes = tl.exp2(tl.dot(keys, query.T) * logit_scale - lse[None, :])
            # [BLOCK_N, CHUNK]
            scores = tl.sum(tl.reshape(votes, (BLOCK_N, GROUP_BLOCK, CHUNK)), 1)
            scores = scores.to(head_scores_ptr.dtype.element_ty)
            tl.store(head_scores_ptr + out[None, :] + tokens[:, None], scores, mask=is_row[None, :])
        first += num_tokens // TILE
        chunk += 1


def plan_chunks(
    req_pool_indices: torch.Tensor,
    rows: SelectionRows,
    shared: SharedPrefixes,
    workspace: DecodeWorkspace,
) -> None:
    """Finds who votes in each segment, and shares out the work, for :func:`score_shared` two launches later.

    Args:
        req_pool_indices: [num_rows] int32 or int64.
    """
    _plan_chunks_kernel[(MAX_SEGMENTS,)](
        rows.num_candidates,
        req_pool_indices,
        shared.members,
        shared.indptr,
        shared.tiles,
        workspace.voters,
        workspace.num_voters,
        workspace.first_chunk,
        workspace.chunks,
        workspace.run_chunk,
        workspace.num_units,
        workspace.shared_arrivals,
        workspace.shared_runs,
        CHUNK=workspace.chunk_rows(len(shared.segment)),
        FIELDS=CHUNK_FIELDS,
        SEGMENTS=MAX_SEGMENTS,
        LANES=LANES,
        PDL=workspace.pdl,
        launch_pdl=workspace.pdl,
        num_warps=4,
    )


def score_shared(
    query: torch.Tensor,
    keys: PagedKeys,
    rows: SelectionRows,
    shared: SharedPrefixes,
    workspace: DecodeWorkspace,
    *,
    num_sink: int,
    vote_scale: float = 1.0,
) -> None:
    """Scores the tiles that rows share, behind :func:`score_decode` of those that they do not.

    The launch before this one must not be :func:`plan_chunks`: its results are read without waiting for that launch.

    Fills the workspace's scores of shared tiles for each KV head, and the log-sum-exp of each row and head, for
    :func:`vote`.

    Args:
        query: [num_rows, num_qo_heads, head_dim] bfloat16 or float16, heads contiguous.
        vote_scale: above 0.
    """
    num_rows, num_qo_heads, head_dim = query.shape
    scale = keys.logit_scale(vote_scale)
    strides = (query.stride(0), keys.pool.stride(0), keys.req_to_token.stride(0))
    work = (workspace.voters, workspace.chunks, workspace.run_chunk, workspace.num_units)
    launch = {"PDL": workspace.pdl, "launch_pdl": workspace.pdl}
    sizes = {"CHUNK": workspace.chunk_rows(num_rows), "FIELDS": CHUNK_FIELDS, "TILE": TILE, **launch}
    heads = {
        "NUM_KV_HEADS": keys.num_kv_heads,
        "GROUP": num_qo_heads // keys.num_kv_heads,
        "GROUP_BLOCK": workspace.group_block,
        "HEAD_DIM": head_dim,
    }
    num_programs = workspace.shared_runs * keys.num_kv_heads
    _shared_logsumexp_kernel[(num_programs,)](
        query,
        keys.pool,
        keys.req_to_token,
        *work,
        workspace.shared_max,
        workspace.shared_sum,
        num_sink,
        scale,
        *strides,
        **heads,
        **sizes,
        LEAST=LEAST,
        BLOCK_N=64,
        NUM_STAGES=5,
        num_warps=4,
    )
    _combine_kernel[(num_rows,)](
        rows.num_candidates,
        shared.shared_tiles,
        shared.segment,
        shared.parent,
        shared.indptr,
        workspace.voters,
        workspace.num_voters,
        workspace.first_chunk,
        workspace.chunks,
        workspace.num_units,
        workspace.partial_max,
        workspace.partial_sum,
        workspace.partition,
        workspace.shared_max,
        workspace.shared_sum,
        workspace.lse,
        workspace.first_tile,
        NUM_HEADS=num_qo_heads,
        HEADS_BLOCK=triton.next_power_of_2(num_qo_heads),
        LANES=LANES,
        PARTIALS=PARTIALS,
        LEAST=LEAST,
        ROWS=rows_block(num_rows),
        **sizes,
        num_warps=4,
    )
    _shared_votes_kernel[(num_programs,)](
        query,
        keys.pool,
        keys.req_to_token,
        *work,
        workspace.lse,
        workspace.first_tile,
        workspace.head_scores,
        num_sink,
        scale,
        *strides,
        workspace.head_scores.stride(0),
        **heads,
        **sizes,
        BLOCK_N=64,
        NUM_STAGES=5,
        num_warps=4,
    )
