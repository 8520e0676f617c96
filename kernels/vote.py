# SPDX-License-Identifier: Apache-2.0
"""The soft vote (paper, section 3.2, Eq. 7), and the groups' maxima that bound who is chosen."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .launch import start_next, wait_for_previous
from .rows import SelectionRows, first_own_tile_of, first_tile_of, rows_block
from .vote_exchange import VoteExchange, place_of_scores, store_scores
from .vote_keys import vote_keys
from .workspace import LEAST, SUBTILE, TILE, DecodeWorkspace, Workspace, previous_power_of_2

VOTE_PROGRAMS = 8
"""Voting programs for each multiprocessor, of one warp each."""

MAX_ROW_PROGRAMS = 512
"""Voting programs of a row, at most: all of them meet in the same groups."""

TAKE_TILES = 8
"""Tiles of shared scores that a voting program looks at at once."""


@triton.jit
def fold_partials(
    top,
    total,
    partial_max_ptr,
    partial_sum_ptr,
    first,
    last,
    stride,
    NUM_HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    PARTIALS: tl.constexpr,
    LEAST: tl.constexpr,
):
    """Folds the pieces ``first`` to ``last`` of a row into the maximum and sum of each head: [HEADS_BLOCK] each."""
    heads = tl.arange(0, HEADS_BLOCK)
    for offset in range(first, last + 1, PARTIALS):
        # [HEADS_BLOCK, PARTIALS]
        piece = offset + tl.arange(0, PARTIALS)[None, :]
        present = (piece <= last) & (heads[:, None] < NUM_HEADS)
        offs = piece * stride + heads[:, None]
        maxima = tl.load(partial_max_ptr + offs, mask=present, other=LEAST)
        sums = tl.load(partial_sum_ptr + offs, mask=present, other=0)
        new_top = tl.maximum(top, tl.max(maxima, 1))
        total = total * tl.exp2(top - new_top) + tl.sum(sums * tl.exp2(maxima - new_top[:, None]), 1)
        top = new_top
    return top, total


@triton.jit
def fold_own_tiles(
    partial_max_ptr,
    partial_sum_ptr,
    partition_ptr,
    row,
    start,
    num_tiles,
    NUM_HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    PARTIALS: tl.constexpr,
    LEAST: tl.constexpr,
):
    """Maximum and sum of each head over a row's own tiles, from what the runs that scored them left."""
    tiles_per_run = tl.load(partition_ptr)
    return fold_partials(
        tl.full([HEADS_BLOCK], LEAST, tl.float32),
        tl.zeros([HEADS_BLOCK], tl.float32),
        partial_max_ptr,
        partial_sum_ptr,
        start // tiles_per_run + row,
        tl.where(num_tiles > 0, (start + num_tiles - 1) // tiles_per_run + row, -1),
        NUM_HEADS,
        NUM_HEADS,
        HEADS_BLOCK,
        PARTIALS,
        LEAST,
    )


@triton.jit
def finish_log_sum_exp(top, total, NUM_HEADS: tl.constexpr, HEADS_BLOCK: tl.constexpr):
    """Base-2 log-sum-exp of each head: [HEADS_BLOCK]. Heads that only fill the block vote exp2(-inf) = 0."""
    is_head = tl.arange(0, HEADS_BLOCK) < NUM_HEADS
    return tl.where(is_head, top + tl.log2(tl.maximum(total, 1e-30)), float("inf"))


@triton.jit
def _add_heads(
    best,
    head_scores_ptr,
    scores_ptr,
    memories_ptr,
    first_score,
    stride_scores_head,
    program,
    shared,
    NUM_KV_HEADS: tl.constexpr,
    TILE: tl.constexpr,
    TAKE: tl.constexpr,
    WORLD: tl.constexpr,
):
    """Scores of the program's tiles among the first ``shared``, and the largest of their keys: [TILE]."""
    stride = tl.num_programs(0)
    for first in range(program, shared, stride * TAKE):
        # [TAKE, TILE]
        tiles = first + stride * tl.arange(0, TAKE)[:, None]
        candidates = tiles * TILE + tl.arange(0, TILE)[None, :]
        scores = tl.zeros([TAKE, TILE], tl.float32)
        for head in tl.static_range(NUM_KV_HEADS):
            offs = head * stride_scores_head + candidates
            scores += tl.load(head_scores_ptr + offs, mask=tiles < shared, other=0).to(tl.float32)
        store_scores(scores_ptr, memories_ptr, first_score + candidates, scores, tiles < shared, WORLD)
        best = tl.maximum(best, tl.max(vote_keys(scores, candidates, tiles < shared), 0))
    return best


@triton.jit(do_not_specialize=["rank"], do_not_specialize_on_alignment=["num_candidates_ptr", "shared_tiles_ptr"])
def _vote_kernel(
    terms_ptr,
    subtile_max_ptr,
    partial_max_ptr,
    partial_sum_ptr,
    partition_ptr,
    num_candidates_ptr,
    shared_tiles_ptr,
    lse_ptr,
    head_scores_ptr,
    scores_ptr,
    maxima_ptr,
    memories_ptr,
    summed_ptr,
    rank,
    first_place,
    stride_place,
    stride_scores_head,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    PARTIALS: tl.constexpr,
    LEAST: tl.constexpr,
    TILE: tl.constexpr,
    SUBTILE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    TAKE: tl.constexpr,
    ROWS: tl.constexpr,
    WORLD: tl.constexpr,
    PDL: tl.constexpr,
):
    row = tl.program_id(1)
    program = tl.program_id(0)
    num_candidates = tl.load(num_candidates_ptr + row, cache_modifier=".cg")
    start = first_own_tile_of(row, num_candidates_ptr, shared_tiles_ptr, ROWS, TILE)
    first_tile = start
    if shared_tiles_ptr is not None:
        first_tile = first_tile_of(row, num_candidates_ptr, ROWS, TILE)
    wait_for_previous(PDL)
    start_next(PDL)
    if num_candidates > 0:
        first_score = first_tile.to(tl.int64) * TILE
        if WORLD > 1:
            first_score += place_of_scores(tl.load(summed_ptr) + 1, rank, first_place, stride_place, WORLD)
        num_tiles = tl.cdiv(num_candidates, TILE)
        lanes = tl.arange(0, TILE)
        heads = tl.arange(0, HEADS_BLOCK)
        best = tl.full([TILE], -1, tl.int64)
        if shared_tiles_ptr is None:
            shared = 0
            top, total = fold_own_tiles(
                partial_max_ptr,
                partial_sum_ptr,
                partition_ptr,
                row,
                start,
                num_tiles,
                NUM_HEADS,
                HEADS_BLOCK,
                PARTIALS,
                LEAST,
            )
            lse = finish_log_sum_exp(top, total, NUM_HEADS, HEADS_BLOCK)
        else:
            shared = tl.load(shared_tiles_ptr + row)
            lse = tl.load(lse_ptr + row * NUM_HEADS + heads, mask=heads < NUM_HEADS, other=float("inf"))
            best = _add_heads(
                best,
                head_scores_ptr + first_tile.to(tl.int64) * TILE,
                scores_ptr,
                memories_ptr,
                first_score,
                stride_scores_head,
                program,
                shared,
                NUM_KV_HEADS,
                TILE,
                TAKE,
                WORLD,
            )
        # The program's tiles are those that leave the same remainder, whoever scored them.
        skipped = tl.cdiv(tl.maximum(shared - program, 0), tl.num_programs(0)) * tl.num_programs(0)
        for tile in range(program + skipped, num_tiles, tl.num_programs(0)):
            tile_heads = (start.to(tl.int64) - shared + tile) * NUM_HEADS + heads[:, None]
            # [HEADS_BLOCK, TILE]
            terms = tl.load(terms_ptr + tile_heads * TILE + lanes[None, :], mask=heads[:, None] < NUM_HEADS, other=0)
            # [HEADS_BLOCK, TILE // SUBTILE]
            subtile_max = tl.load(
                subtile_max_ptr + tile_heads * (TILE // SUBTILE) + tl.arange(0, TILE // SUBTILE)[None, :],
                mask=heads[:, None] < NUM_HEADS,
                other=0,
            )
            weights = tl.exp2(subtile_max - lse[:, None])
            terms = tl.reshape(terms.to(tl.float32), (HEADS_BLOCK, TILE // SUBTILE, SUBTILE))
            scores = tl.reshape(tl.sum(terms * weights[:, :, None], 0), (TILE,))
            candidates = tile * TILE + lanes
            store_scores(scores_ptr, memories_ptr, first_score + candidates, scores, None, WORLD)
            best = tl.maximum(best, vote_keys(scores, candidates, candidates < num_candidates))
        # Candidate j is in group j % NUM_GROUPS. So neighbours, which are often chosen together, and
        # the first of many ties are in groups of their own.
        if WORLD == 1:
            groups = row.to(tl.int64) * NUM_GROUPS + (program * TILE + lanes) % NUM_GROUPS
            tl.atomic_max(maxima_ptr + groups, best, mask=best >= 0, sem="relaxed")


def vote(
    rows: SelectionRows,
    num_rows: int,
    workspace: DecodeWorkspace,
    *,
    shared_tiles: torch.Tensor | None = None,
    lse: torch.Tensor | None = None,
    exchange: VoteExchange | None = None,
) -> None:
    """Sums the heads' votes to one score for each candidate, for :func:`emit`.

    Args:
        shared_tiles: as in :func:`score_decode`; the votes of each KV head's heads are summed already.
        lse: with ``shared_tiles``, [at least num_rows, num_qo_heads] float32, base 2, over all candidates of a row.
        exchange: the heads are those of one rank, and the scores go to all ranks, where :func:`sum_votes` adds them
            up; None: these are all heads that vote.
    """
    limits = workspace.limits
    programs = previous_power_of_2(VOTE_PROGRAMS * workspace.num_multiprocessors // num_rows)
    # The candidates of a program are then always in the same groups.
    programs = max(min(programs, MAX_ROW_PROGRAMS), limits.num_groups // TILE)
    _vote_kernel[(programs, num_rows)](
        workspace.terms,
        workspace.subtile_max,
        workspace.partial_max,
        workspace.partial_sum,
        workspace.partition,
        rows.num_candidates,
        shared_tiles,
        lse,
        workspace.head_scores,
        workspace.scores,
        workspace.maxima,
        exchange.addresses if exchange else None,
        exchange.summed if exchange else None,
        exchange.rank if exchange else 0,
        exchange.layout.first_place if exchange else 0,
        exchange.layout.place_size if exchange else 0,
        workspace.head_scores.stride(0),
        NUM_HEADS=workspace.num_qo_heads,
        NUM_KV_HEADS=workspace.num_kv_heads,
        HEADS_BLOCK=triton.next_power_of_2(workspace.num_qo_heads),
        PARTIALS=16,
        LEAST=LEAST,
        TILE=TILE,
        SUBTILE=SUBTILE,
        NUM_GROUPS=limits.num_groups,
        TAKE=TAKE_TILES,
        ROWS=rows_block(num_rows),
        WORLD=exchange.layout.world_size if exchange else 1,
        PDL=workspace.pdl,
        launch_pdl=workspace.pdl,
        num_warps=1,
    )


@triton.jit
def _take_scores_kernel(
    num_candidates_ptr,
    scores_ptr,
    maxima_ptr,
    TILE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    TAKE: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    row = tl.program_id(1)
    program = tl.program_id(0)
    num_candidates = tl.load(num_candidates_ptr + row)
    start = first_tile_of(row, num_candidates_ptr, ROWS, TILE).to(tl.int64)
    lanes = tl.arange(0, TAKE)
    best = tl.full([TAKE], -1, tl.int64)
    for offset in range(program * TAKE, num_candidates, tl.num_programs(0) * TAKE):
        candidates = offset + lanes
        scores = tl.load(scores_ptr + start * TILE + candidates, mask=candidates < num_candidates, other=0)
        best = tl.maximum(best, vote_keys(scores, candidates, candidates < num_candidates))
    groups = row.to(tl.int64) * NUM_GROUPS + (program * TAKE + lanes) % NUM_GROUPS
    tl.atomic_max(maxima_ptr + groups, best, mask=best >= 0, sem="relaxed")
    start_next(PDL)


def take_scores(rows: SelectionRows, num_rows: int, workspace: Workspace) -> None:
    """Prepares the scores that somebody else put into the workspace, for :func:`emit`.

    Row r's scores are ``workspace.scores.view(-1)[first[r] * TILE :][: num_candidates[r]]`` float32, not
    negative, where ``first`` counts the tiles of the rows before.
    """
    programs, take = workspace.take_programs(num_rows)
    _take_scores_kernel[(programs, num_rows)](
        rows.num_candidates,
        workspace.scores,
        workspace.maxima,
        TILE=TILE,
        NUM_GROUPS=workspace.limits.num_groups,
        TAKE=take,
        ROWS=rows_block(num_rows),
        PDL=workspace.pdl,
        launch_pdl=workspace.pdl,
        num_warps=4,
    )
