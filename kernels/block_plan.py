# SPDX-License-Identifier: Apache-2.0
"""How the scoring of a prefill's blocks is cut into programs: host work, once per forward, and its scratch memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton

from .transfer import int32
from .workspace import TILE, count_tiles

MAX_ROWS_PER_BLOCK = 128

SPLITS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64)
"""Programs along the keys that may share the longest request's log-sum-exp."""

PROGRAMS_PER_SM = 2
"""Programs of the first pass that fit a multiprocessor at once, with the default tuning."""


@dataclass(frozen=True)
class PassTuning:
    """How one pass is launched: rows and tokens of a program's tile, warps, depth of its loads, registers a thread.

    Tiles have 16 to 128 rows and 32 to 256 tokens, powers of two. A plan with fewer rows than ``block_m``, or more
    rows per block, takes another tile.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None


@dataclass(frozen=True)
class Tuning:
    """Launch shapes of both passes; the defaults were the fastest of those tried on an H200, for 32/8 heads.

    A program waits for its own dots, so several must share a multiprocessor: one computes exponents while another
    multiplies. The registers of the second pass are what lets three in.
    """

    logsumexp: PassTuning = PassTuning(128, 128, 8, 3)
    votes: PassTuning = PassTuning(64, 128, 4, 2, max_registers=168)


DEFAULT_TUNING = Tuning()


@dataclass(frozen=True)
class Tiling:
    """How one pass cuts its work into programs. A row tile is a run of blocks of one request.

    Attributes:
        row_tiles: [num_row_tiles, 4] int32: first block, number of blocks, least and most candidates among them.
        requests: [num_requests + 1, 2] int32: the first row tile and the first unit of work of each run of blocks of
            one request; the last row holds the totals. In a run the row tile is the fastest, so that programs which
            run together read the same keys.
        num_units: (row tile, key split) pairs of the first pass, (row tile, key tile) pairs of the second.
        tuning: block_m already fits the rows.
    """

    row_tiles: torch.Tensor
    requests: torch.Tensor
    num_units: int
    tuning: PassTuning


@dataclass(frozen=True)
class BlockPlan:
    """What :func:`score_blocks` does in each layer of one forward; made by :func:`plan_blocks`.

    Attributes:
        req_pool_indices: [num_blocks] int32, each block's row of ``req_to_token``.
        num_candidates: [num_blocks] int32, tokens.
        num_rows: [num_blocks] int32, rows of means that each block has; the rest of its rows do not vote.
        tile_indptr: [num_blocks + 1] int32: block b's scores are the first ``num_candidates[b]`` numbers of the
            tiles from ``tile_indptr[b]`` on, the layout of a workspace (``rows.row_tiles``).
        logsumexp, votes: the work of the two passes.
        rows_per_block: rows of the means for each block, those that do not vote included.
        num_qo_heads: heads that the splits were chosen for.
        num_tiles: ``tile_indptr[num_blocks]``, on the host.
        split_tokens: candidates of each program of the first pass.
    """

    req_pool_indices: torch.Tensor
    num_candidates: torch.Tensor
    num_rows: torch.Tensor
    tile_indptr: torch.Tensor
    logsumexp: Tiling
    votes: Tiling
    rows_per_block: int
    num_qo_heads: int
    num_tiles: int
    split_tokens: int

    @property
    def num_blocks(self) -> int:
        return self.num_rows.shape[0]


@dataclass(frozen=True)
class BlockScratch:
    """Memory between the kernels, allocated once for stated maxima; its contents mean nothing between calls.

    Attributes:
        partial: [2, SPLITS[-1], num_qo_heads, max_rows] float32: maximum and sum of each split, base 2.
        lse: [num_qo_heads, max_rows] float32, base 2.
    """

    partial: torch.Tensor
    lse: torch.Tensor

    @classmethod
    def allocate(cls, max_rows: int, num_qo_heads: int, device: torch.device | str) -> BlockScratch:
        """``max_rows`` are the rows of the means: blocks of one part times rows_per_block; 516 bytes each and head."""
        return cls(
            partial=torch.empty(2, SPLITS[-1], num_qo_heads, max_rows, dtype=torch.float32, device=device),
            lse=torch.empty(num_qo_heads, max_rows, dtype=torch.float32, device=device),
        )


def count_rows_per_block(block: int, sub_block: int) -> int:
    """Sub-blocks of a whole block: the rows of means that each block of a prefill has.

    Raises:
        ValueError: ``sub_block`` does not divide ``block``, or not into a power of two up to 128.
    """
    if sub_block < 1 or block < 1 or block % sub_block:
        raise ValueError(f"sub_block: expected a divisor of block={block}, got {sub_block}")
    rows = block // sub_block
    if rows > MAX_ROWS_PER_BLOCK or rows & (rows - 1):
        raise ValueError(f"block // sub_block: expected a power of two up to {MAX_ROWS_PER_BLOCK}, got {rows}")
    return rows


def plan_blocks(
    req_pool_indices: Sequence[int],
    num_candidates: Sequence[int],
    num_rows: Sequence[int],
    *,
    rows_per_block: int,
    num_qo_heads: int,
    num_multiprocessors: int,
    tuning: Tuning = DEFAULT_TUNING,
) -> BlockPlan:
    """Cuts the scoring of blocks into programs. The plan's tensors are on the host, for :func:`to_device`.

    Blocks of one request should follow each other: then they share the reading of its keys.

    Args:
        req_pool_indices: [num_blocks] rows of ``req_to_token``; one block at least.
        num_candidates: [num_blocks] candidates, in tokens.
        num_rows: [num_blocks] rows of means that vote, 1 to ``rows_per_block``.
        rows_per_block: see :func:`count_rows_per_block`.
        num_multiprocessors: of the device, which the first pass is to fill.
    """
    runs = request_runs(req_pool_indices)
    longest_run = max(map(len, runs)) * rows_per_block
    logsumexp = _fit_rows(tuning.logsumexp, longest_run, rows_per_block)
    votes = _fit_rows(tuning.votes, longest_run, rows_per_block)
    blocks_per_tile = logsumexp.block_m // rows_per_block
    split_tokens = _choose_split(
        [(num_qo_heads * triton.cdiv(len(run), blocks_per_tile), max(num_candidates[b] for b in run)) for run in runs],
        slots=num_multiprocessors * PROGRAMS_PER_SM,
    )
    tile_indptr = count_tiles(num_candidates)
    return BlockPlan(
        req_pool_indices=int32(req_pool_indices),
        num_candidates=int32(num_candidates),
        num_rows=int32(num_rows),
        tile_indptr=int32(tile_indptr),
        logsumexp=_tile_rows(runs, num_candidates, rows_per_block, split_tokens, logsumexp),
        votes=_tile_rows(runs, num_candidates, rows_per_block, votes.block_n, votes),
        rows_per_block=rows_per_block,
        num_qo_heads=num_qo_heads,
        num_tiles=tile_indptr[-1],
        split_tokens=split_tokens,
    )


def request_runs(req_pool_indices: Sequence[int]) -> list[range]:
    """Runs of neighbouring blocks of one request."""
    runs: list[range] = []
    for block, request in enumerate(req_pool_indices):
        if runs and req_pool_indices[runs[-1].start] == request:
            runs[-1] = range(runs[-1].start, block + 1)
        else:
            runs.append(range(block, block + 1))
    return runs


def _fit_rows(tuning: PassTuning, longest_run: int, rows_per_block: int) -> PassTuning:
    """Takes no more rows than the longest run of blocks has, rounded up, and no fewer than a block."""
    block_m = max(16, rows_per_block, min(tuning.block_m, triton.next_power_of_2(longest_run)))
    if block_m == tuning.block_m:
        return tuning
    return PassTuning(block_m, min(tuning.block_n, TILE), 8 if block_m == 128 else 4, tuning.num_stages)


def _choose_split(runs: list[tuple[int, int]], *, slots: int) -> int:
    """Candidates of each program of the first pass, so that the programs take the shortest time.

    Args:
        runs: (programs of one split, candidates) of each run of blocks of one request.
        slots: programs that run at once.
    """
    quantum = 2 * TILE  # the widest key tile
    overhead = 2 * TILE  # what a program costs besides its keys
    longest = max(tokens for _, tokens in runs)

    def cost(split: int) -> int:
        work = sum(programs * (tokens + triton.cdiv(tokens, split) * overhead) for programs, tokens in runs)
        return triton.cdiv(work, slots * (split + overhead)) * (split + overhead)

    return min((max(triton.cdiv(longest, n * quantum), 1) * quantum for n in SPLITS), key=cost)


def _tile_rows(
    runs: list[range], num_candidates: Sequence[int], rows_per_block: int, unit_tokens: int, tuning: PassTuning
) -> Tiling:
    """Row tiles of ``tuning.block_m`` rows, with a unit of work for each ``unit_tokens`` candidates."""
    blocks_per_tile = tuning.block_m // rows_per_block
    row_tiles, requests, num_units = [], [], 0
    for run in runs:
        requests.append((len(row_tiles), num_units))
        tiles = [run[i : i + blocks_per_tile] for i in range(0, len(run), blocks_per_tile)]
        for tile in tiles:
            counts = num_candidates[tile.start : tile.stop]
            row_tiles.append((tile.start, len(tile), min(counts), max(counts)))
        num_units += len(tiles) * triton.cdiv(max(num_candidates[b] for b in run), unit_tokens)
    requests.append((len(row_tiles), num_units))
    return Tiling(int32(row_tiles), int32(requests), num_units, tuning)
