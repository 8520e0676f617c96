# SPDX-License-Identifier: Apache-2.0
"""How the scoring of a prefill's blocks is cut into programs: host work, once per forward, and its scratch memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import triton

from .transfer import int32
from .workspace import TILE, count_tiles

MAX_ROWS_PER_BLOCK = 128

SPLITS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48, 64)
"""Programs along the keys that may share the longest request's log-sum-exp."""

KEY_QUANTUM = 2 * TILE
"""Candidates, those of the widest key tile. Splits begin at its multiples, and what blocks share ends there, so that
no key tile goes on where a block's keys lie in other slots."""

MAX_LEVELS = 32
"""Shared runs that hold one block, at most. Each may cost a split, and half of the splits are left for the length."""

TILE_COST = 64
"""Rows: what a program's key tile costs besides its rows."""

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
class BlockRun:
    """Neighbouring blocks whose candidates [begin, end) lie in the same slots: read once for a row tile of them.

    Attributes:
        blocks: indices. Each has candidates behind ``begin``, and may have fewer than ``end`` or more.
        begin, end: candidates, multiples of KEY_QUANTUM, except an end that is the most candidates of these blocks.
        level: runs that hold the candidates before ``begin``, of these blocks and of others.
    """

    blocks: range
    begin: int
    end: int
    level: int


@dataclass(frozen=True)
class Tiling:
    """How one pass cuts its work into programs. A row tile is a piece of a :class:`BlockRun`.

    Attributes:
        row_tiles: [num_row_tiles, 6] int32: first block, number of blocks, the run's begin (in units of TILE), least
            and most candidates among the blocks, both no more than the run's end, first split of the run.
        runs: [num_runs + 1, 2] int32: the first row tile and the first unit of work of each run; the last row holds
            the totals. In a run the row tile is the fastest, so that programs which run together read the same keys.
        num_units: (row tile, key split) pairs of the first pass, (row tile, key tile) pairs of the second.
        tuning: block_m already fits the rows.
    """

    row_tiles: torch.Tensor
    runs: torch.Tensor
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
        num_splits: [num_blocks] int32, programs of the first pass along each block's candidates.
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
    num_splits: torch.Tensor
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
    num_common: Sequence[int] = (),
    tuning: Tuning = DEFAULT_TUNING,
) -> BlockPlan:
    """Cuts the scoring of blocks into programs. The plan's tensors are on the host, for :func:`to_device`.

    Blocks of one request should follow each other: then they share the reading of its keys. Those of several
    requests do where ``num_common`` says so.

    Args:
        req_pool_indices: [num_blocks] rows of ``req_to_token``; one block at least.
        num_candidates: [num_blocks] candidates, in tokens.
        num_rows: [num_blocks] rows of means that vote, 1 to ``rows_per_block``.
        rows_per_block: see :func:`count_rows_per_block`.
        num_multiprocessors: of the device, which the first pass is to fill.
        num_common: [num_blocks - 1], of a block's candidates and the next one's, how many of the first lie in the
            same slots, multiples of KEY_QUANTUM; blocks of one request have all in common, whatever it says. Empty:
            only those share.

    Raises:
        ValueError: ``num_common`` is not as stated.
    """
    runs = cut_runs(req_pool_indices, num_candidates, num_common)
    is_shared = any(num_common)
    logsumexp = _fit_rows(tuning.logsumexp, runs, rows_per_block, is_shared=is_shared)
    votes = _fit_rows(tuning.votes, runs, rows_per_block, is_shared=is_shared)
    blocks_per_tile = logsumexp.block_m // rows_per_block
    split_tokens = _choose_split(
        [(num_qo_heads * triton.cdiv(len(run.blocks), blocks_per_tile), run.end - run.begin) for run in runs],
        longest=max(num_candidates),
        most=SPLITS[-1] - max((run.level for run in runs), default=0),
        slots=num_multiprocessors * PROGRAMS_PER_SM,
    )
    first_splits, num_splits = _count_splits(runs, num_candidates, split_tokens)
    tile_indptr = count_tiles(num_candidates)
    return BlockPlan(
        req_pool_indices=int32(req_pool_indices),
        num_candidates=int32(num_candidates),
        num_rows=int32(num_rows),
        tile_indptr=int32(tile_indptr),
        num_splits=int32(num_splits),
        logsumexp=_tile_rows(runs, first_splits, num_candidates, rows_per_block, split_tokens, logsumexp),
        votes=_tile_rows(runs, first_splits, num_candidates, rows_per_block, votes.block_n, votes),
        rows_per_block=rows_per_block,
        num_qo_heads=num_qo_heads,
        num_tiles=tile_indptr[-1],
        split_tokens=split_tokens,
    )


def request_runs(req_pool_indices: Sequence[int]) -> list[range]:
    """Runs of neighbouring blocks of one request."""
    return _join(range(len(req_pool_indices)), lambda b: req_pool_indices[b] == req_pool_indices[b + 1])


def cut_runs(
    req_pool_indices: Sequence[int], num_candidates: Sequence[int], num_common: Sequence[int] = ()
) -> list[BlockRun]:
    """Runs that hold each block's candidates once, a run before those that go on where it ends.

    For the arguments see :func:`plan_blocks`.
    """
    num_blocks = len(num_candidates)
    if num_common and (len(num_common) != num_blocks - 1 or any(count % KEY_QUANTUM for count in num_common)):
        raise ValueError(f"num_common: expected {num_blocks - 1} multiples of {KEY_QUANTUM}, got {[*num_common]}")
    common = [*num_common] or [0] * (num_blocks - 1)
    longest = max(num_candidates)
    for run in request_runs(req_pool_indices):
        common[run.start : run.stop - 1] = [longest] * (len(run) - 1)
    return [*_cut_level(range(num_blocks), 0, 0, num_candidates, common)]


def _cut_level(
    blocks: range, begin: int, level: int, num_candidates: Sequence[int], common: Sequence[int]
) -> Iterator[BlockRun]:
    """Runs of the candidates from ``begin`` on, of blocks that lie in ``level`` shared runs before it."""
    least = begin if level < MAX_LEVELS else max(num_candidates) - 1
    going_on = [b for b in blocks if num_candidates[b] > begin]
    for run in _join(going_on, lambda b: common[b] > least):
        end = min([max(num_candidates[b] for b in run), *(common[b] for b in run[:-1])])
        yield BlockRun(run, begin, end, level)
        yield from _cut_level(run, end, level + 1, num_candidates, common)


def _join(blocks: Iterable[int], has_next: Callable[[int], bool]) -> list[range]:
    """Runs of neighbours; ``has_next(b)`` says whether block b + 1, if that is there, belongs to b's run."""
    runs: list[range] = []
    for block in blocks:
        if runs and runs[-1].stop == block and has_next(block - 1):
            runs[-1] = range(runs[-1].start, block + 1)
        else:
            runs.append(range(block, block + 1))
    return runs


def _fit_rows(tuning: PassTuning, runs: Sequence[BlockRun], rows_per_block: int, *, is_shared: bool) -> PassTuning:
    """Takes no more rows than the longest run of blocks has, rounded up, and no fewer than a block.

    Where requests share keys, their runs are long before they part and short behind. Then the tile is the one that
    suits the work as a whole.
    """
    least = max(16, rows_per_block)
    longest = max((len(run.blocks) for run in runs), default=1) * rows_per_block
    block_m = max(least, min(tuning.block_m, triton.next_power_of_2(longest)))

    def cost(size: int) -> int:
        tiles = ((triton.cdiv(len(run.blocks) * rows_per_block, size), run.end - run.begin) for run in runs)
        return (size + TILE_COST) * sum(count * tokens for count, tokens in tiles)

    if is_shared:
        block_m = min((block_m >> i for i in range((block_m // least).bit_length())), key=cost)
    if block_m == tuning.block_m:
        return tuning
    return PassTuning(block_m, min(tuning.block_n, TILE), 8 if block_m == 128 else 4, tuning.num_stages)


def _choose_split(runs: list[tuple[int, int]], *, longest: int, most: int, slots: int) -> int:
    """Candidates of each program of the first pass, so that the programs take the shortest time.

    Args:
        runs: (programs of one split, candidates) of each run of blocks.
        longest: candidates of a block, at most.
        most: splits of so many candidates, at most.
        slots: programs that run at once.
    """
    overhead = 2 * TILE  # what a program costs besides its keys

    def cost(split: int) -> int:
        work = sum(programs * (tokens + triton.cdiv(tokens, split) * overhead) for programs, tokens in runs)
        return triton.cdiv(work, slots * (split + overhead)) * (split + overhead)

    counts = (n for n in SPLITS if n <= most)
    return min((max(triton.cdiv(longest, n * KEY_QUANTUM), 1) * KEY_QUANTUM for n in counts), key=cost)


def _count_splits(
    runs: Sequence[BlockRun], num_candidates: Sequence[int], split_tokens: int
) -> tuple[list[int], list[int]]:
    """The first split of each run, behind those of the runs before it in its blocks, and the splits of each block."""
    first_splits, num_splits = [], [0] * len(num_candidates)
    for run in runs:
        first_splits.append(num_splits[run.blocks.start])
        for b in run.blocks:
            num_splits[b] += triton.cdiv(min(num_candidates[b], run.end) - run.begin, split_tokens)
    return first_splits, num_splits


def _tile_rows(
    runs: Sequence[BlockRun],
    first_splits: Sequence[int],
    num_candidates: Sequence[int],
    rows_per_block: int,
    unit_tokens: int,
    tuning: PassTuning,
) -> Tiling:
    """Row tiles of ``tuning.block_m`` rows, with a unit of work for each ``unit_tokens`` candidates."""
    blocks_per_tile = tuning.block_m // rows_per_block
    row_tiles: list[tuple[int, ...]] = []
    tiled_runs: list[tuple[int, int]] = []
    num_units = 0
    for run, first_split in zip(runs, first_splits, strict=True):
        tiled_runs.append((len(row_tiles), num_units))
        tiles = [run.blocks[i : i + blocks_per_tile] for i in range(0, len(run.blocks), blocks_per_tile)]
        for tile in tiles:
            counts = [min(count, run.end) for count in num_candidates[tile.start : tile.stop]]
            row_tiles.append((tile.start, len(tile), run.begin // TILE, min(counts), max(counts), first_split))
        num_units += len(tiles) * triton.cdiv(run.end - run.begin, unit_tokens)
    tiled_runs.append((len(row_tiles), num_units))
    return Tiling(int32(row_tiles), int32(tiled_runs), num_units, tuning)
