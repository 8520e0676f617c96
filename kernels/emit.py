# SPDX-License-Identifier: Apache-2.0
"""Exact top-k of the scored candidates, written as the slots that the attention reads.

Each row becomes sink, chosen and tail slots in ascending position, at its place in `kv_indices`; a row that
voted leaves its vote in the selection cache; a row that reuses a vote takes it from there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import start_next, wait_for_previous
from .rows import SelectionRows, first_tile_of, rows_block
from .selection_cache import SelectionCache
from .vote_keys import BLOCK, find_threshold, vote_keys
from .workspace import MAX_RUNS, TILE, Workspace, previous_power_of_2

SCAN = 2048
"""Candidates that a program looks at at once."""


@triton.jit
def _copy_ends(slots_ptr, out_ptr, num_sink, num_chosen, tail_start, kv_end, BLOCK: tl.constexpr):
    """Slots of the sink and of the tail."""
    sink = tl.minimum(num_sink, kv_end)
    for offset in range(0, sink + kv_end - tail_start, BLOCK):
        i = offset + tl.arange(0, BLOCK)
        inside = i < sink + kv_end - tail_start
        slots = tl.load(slots_ptr + tl.where(i < sink, i, tail_start + i - sink), mask=inside)
        tl.store(out_ptr + tl.where(i < sink, i, i + num_chosen), slots, mask=inside)


@triton.jit
def _compact(scores_ptr, segment_ptr, bound, begin, end, SCAN: tl.constexpr):
    """Keys of candidates [begin, end) that reach the bound, in order, to the segment. Returns how many."""
    length = 0
    scores = tl.load(scores_ptr + begin + tl.arange(0, SCAN), mask=begin + tl.arange(0, SCAN) < end, other=0)
    for offset in range(begin, end, SCAN):
        candidates = offset + tl.arange(0, SCAN)
        following = tl.load(scores_ptr + candidates + SCAN, mask=candidates + SCAN < end, other=0)
        keys = vote_keys(scores, candidates, candidates < end)
        reach = (keys >= bound).to(tl.int32)
        tl.store(segment_ptr + length + tl.cumsum(reach) - 1, keys, mask=reach > 0)
        length += tl.sum(reach)
        scores = following
    return length


@triton.jit
def _join_segments(
    segments_ptr, segment_size, length, before, shortlist_ptr, SEGMENTS: tl.constexpr, WIDTH: tl.constexpr
):
    """Segments of more than WIDTH keys, in order and without holes, in the shortlist. Returns its first block."""
    for offset in range(0, tl.max(length), WIDTH):
        # [SEGMENTS, WIDTH]
        i = offset + tl.arange(0, WIDTH)[None, :]
        keys = tl.load(
            segments_ptr + segment_size * tl.arange(0, SEGMENTS)[:, None] + i,
            mask=i < length[:, None],
            cache_modifier=".cg",
        )
        tl.store(shortlist_ptr + before[:, None] + i, keys, mask=i < length[:, None])
    tl.debug_barrier()
    lanes = tl.arange(0, SEGMENTS * WIDTH)
    return tl.load(shortlist_ptr + lanes, mask=lanes < tl.sum(length), other=-1)


@triton.jit
def _write_chosen(keys, cut, slots_ptr, out_ptr, vote_ptr, keep):
    """Slots of the keys that reach the cut, and the keys themselves if they are kept. Returns how many."""
    chosen = keys >= cut
    candidate = 0x7FFFFFFF - (keys & 0x7FFFFFFF).to(tl.int32)
    slots = tl.load(slots_ptr + candidate, mask=chosen)
    index = tl.cumsum(chosen.to(tl.int32)) - 1
    tl.store(out_ptr + index, slots, mask=chosen)
    tl.store(vote_ptr + index, keys, mask=chosen & keep)
    return tl.sum(chosen.to(tl.int32))


@triton.jit
def _reuse(vote_ptr, vote_len_ptr, cut_ptr, num_chosen, slots_ptr, out_ptr, max_budget, BLOCK: tl.constexpr):
    """The best ``num_chosen`` members of a kept vote. In most steps that is one less than in the step before."""
    lanes = tl.arange(0, BLOCK)
    vote_len = tl.load(vote_len_ptr)
    cut = tl.load(cut_ptr)
    keys = tl.load(vote_ptr + lanes, mask=lanes < max_budget, other=-1)
    keys = tl.where(lanes < vote_len, keys, -1)
    reached = tl.sum((keys >= cut).to(tl.int32))
    if reached == num_chosen + 1:
        cut = tl.min(tl.where(keys >= cut, keys, 0x7FFFFFFFFFFFFFFF)) + 1
        reached = num_chosen
    if reached != num_chosen:
        cut = find_threshold(keys, vote_ptr, vote_len, num_chosen, 0, BLOCK)
    tl.store(cut_ptr, cut)
    _write_chosen(keys, cut, slots_ptr, out_ptr, vote_ptr, False)


# Neither layers' views of stacked entries nor parts of the rows are aligned alike.
@triton.jit(
    do_not_specialize_on_alignment=[
        "req_pool_indices_ptr",
        "kv_start_ptr",
        "num_candidates_ptr",
        "num_chosen_ptr",
        "tail_start_ptr",
        "kv_end_ptr",
        "cached_ptr",
        "cache_slots_ptr",
        "cached_vote_len_ptr",
        "cached_cut_ptr",
    ],
)
def _emit_kernel(
    req_to_token_ptr,
    req_pool_indices_ptr,
    kv_start_ptr,
    kv_indices_ptr,
    num_candidates_ptr,
    num_chosen_ptr,
    tail_start_ptr,
    kv_end_ptr,
    cached_ptr,
    scores_ptr,
    maxima_ptr,
    segments_ptr,
    segment_len_ptr,
    shortlist_ptr,
    arrivals_ptr,
    cache_slots_ptr,
    cached_vote_ptr,
    cached_vote_len_ptr,
    cached_cut_ptr,
    num_sink,
    stride_table_row,
    max_budget,
    HAS_CACHE: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    SEGMENTS: tl.constexpr,
    SCAN: tl.constexpr,
    BLOCK: tl.constexpr,
    VOTE_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    segment = tl.program_id(0)
    row = tl.program_id(1)
    num_candidates = tl.load(num_candidates_ptr + row, cache_modifier=".cg")
    num_chosen = tl.load(num_chosen_ptr + row, cache_modifier=".cg")
    tail_start = tl.load(tail_start_ptr + row, cache_modifier=".cg")
    kv_end = tl.load(kv_end_ptr + row, cache_modifier=".cg")
    req = tl.load(req_pool_indices_ptr + row).to(tl.int64)
    out_ptr = kv_indices_ptr + tl.load(kv_start_ptr + row)
    slots_ptr = req_to_token_ptr + req * stride_table_row
    first = first_tile_of(row, num_candidates_ptr, ROWS, TILE).to(tl.int64) * TILE
    lanes = tl.arange(0, BLOCK)
    wait_for_previous(PDL)
    start_next(PDL)
    if segment == SEGMENTS - 1:
        _copy_ends(slots_ptr, out_ptr, num_sink, num_chosen, tail_start, kv_end, 1024)

    slots_ptr += num_sink
    out_ptr += num_sink
    vote_ptr = shortlist_ptr
    cut_ptr = shortlist_ptr
    keep = False
    if HAS_CACHE:
        cache_slot = tl.load(cache_slots_ptr + row).to(tl.int64)
        vote_ptr = cached_vote_ptr + cache_slot * max_budget
        cut_ptr = cached_cut_ptr + cache_slot
        keep = cache_slot >= 0
        if (segment == 0) & (tl.load(cached_ptr + row) > 0) & (num_chosen > 0):
            vote_len_ptr = cached_vote_len_ptr + cache_slot
            _reuse(vote_ptr, vote_len_ptr, cut_ptr, num_chosen, slots_ptr, out_ptr, max_budget, VOTE_BLOCK)
    if num_candidates > 0:
        # As many groups reach the bound as candidates are wanted, so at least as many candidates do.
        row_maxima_ptr = maxima_ptr + row.to(tl.int64) * NUM_GROUPS
        maxima = tl.load(row_maxima_ptr + lanes, mask=lanes < NUM_GROUPS, other=-1)
        bound = find_threshold(maxima, row_maxima_ptr, NUM_GROUPS, num_chosen, num_chosen >> 3, BLOCK)
        segment_size = tl.cdiv(tl.cdiv(num_candidates, TILE), SEGMENTS) * TILE
        begin = segment * segment_size
        end = tl.minimum(begin + segment_size, num_candidates)
        length = _compact(scores_ptr + first, segments_ptr + first + begin, bound, begin, end, SCAN)
        row_len_ptr = segment_len_ptr + row * SEGMENTS
        tl.store(row_len_ptr + segment, length)
        tl.debug_barrier()
        if tl.atomic_add(arrivals_ptr + row, 1, sem="acq_rel") == SEGMENTS - 1:
            # All programs of the row have its bound: both go back to what the next call expects.
            tl.store(arrivals_ptr + row, 0)
            for offset in range(0, NUM_GROUPS, BLOCK):
                tl.store(row_maxima_ptr + offset + lanes, -1, mask=offset + lanes < NUM_GROUPS)
            # [SEGMENTS, BLOCK // SEGMENTS]: with holes, if no segment is longer than that.
            segments = tl.arange(0, SEGMENTS)
            lengths = tl.load(row_len_ptr + segments, cache_modifier=".cg")
            i = tl.arange(0, BLOCK // SEGMENTS)[None, :]
            held_ptr = segments_ptr + first + segments[:, None] * segment_size + i
            held = tl.load(held_ptr, mask=i < lengths[:, None], other=-1, cache_modifier=".cg")
            held = tl.reshape(held, (BLOCK,))
            keys_ptr = shortlist_ptr + first
            num_keys = BLOCK
            if tl.max(lengths) > BLOCK // SEGMENTS:
                before = tl.cumsum(lengths) - lengths
                held = _join_segments(
                    segments_ptr + first, segment_size, lengths, before, keys_ptr, SEGMENTS, BLOCK // SEGMENTS
                )
                num_keys = tl.sum(lengths)
            cut = find_threshold(held, keys_ptr, num_keys, num_chosen, 0, BLOCK)
            written = _write_chosen(held, cut, slots_ptr, out_ptr, vote_ptr, keep)
            for offset in range(BLOCK, num_keys, BLOCK):
                keys = tl.load(keys_ptr + offset + lanes, mask=offset + lanes < num_keys, other=-1)
                written += _write_chosen(keys, cut, slots_ptr, out_ptr + written, vote_ptr + written, keep)
            if keep:
                tl.store(cut_ptr, cut)


def emit(
    req_to_token: torch.Tensor,
    req_pool_indices: torch.Tensor,
    rows: SelectionRows,
    num_rows: int,
    workspace: Workspace,
    kv_start: torch.Tensor,
    kv_indices: torch.Tensor,
    *,
    num_sink: int,
    cache: SelectionCache | None = None,
    cache_slots: torch.Tensor | None = None,
) -> None:
    """Chooses among the bounded candidates and writes the slots of every row.

    A row with ``kv_end`` 0 and no candidates gets no slots: nothing is written for it.

    Args:
        req_to_token: [num_req_rows, max_context_len] int32.
        kv_start: [>= num_rows] int32, where in ``kv_indices`` each row's slots begin; an indptr will do.
        kv_indices: int32, written: as many slots of each row as it attends to.
        cache: entries that rows reuse or leave their vote in; needs ``cache_slots``, [num_rows] int32.
    """
    limits = workspace.limits
    # One program for each multiprocessor or so, since each searches on its own.
    segments = min(previous_power_of_2(workspace.num_multiprocessors // num_rows), MAX_RUNS)
    _emit_kernel[(segments, num_rows)](
        req_to_token,
        req_pool_indices,
        kv_start,
        kv_indices,
        rows.num_candidates,
        rows.num_chosen,
        rows.tail_start,
        rows.kv_end,
        rows.cached,
        workspace.scores,
        workspace.maxima,
        workspace.segments,
        workspace.segment_len,
        workspace.shortlist,
        workspace.arrivals,
        cache_slots,
        cache.vote if cache else None,
        cache.vote_len if cache else None,
        cache.cut if cache else None,
        num_sink,
        req_to_token.stride(0),
        limits.max_budget,
        HAS_CACHE=cache is not None,
        ROWS=rows_block(num_rows),
        TILE=TILE,
        NUM_GROUPS=limits.num_groups,
        SEGMENTS=segments,
        SCAN=SCAN,
        BLOCK=BLOCK,
        VOTE_BLOCK=triton.next_power_of_2(limits.max_budget),
        PDL=workspace.pdl,
        launch_pdl=workspace.pdl,
        num_warps=8,
    )
