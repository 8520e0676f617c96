# SPDX-License-Identifier: Apache-2.0
"""What each row of a selection attends to, on the device: the form that all kernels share."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import triton
import triton.language as tl

EVERYTHING = -1
"""Budget of a decode row or of a block of queries that attends to everything, by slots that the caller writes."""


@dataclass(frozen=True)
class SelectionRows:
    """One row for each decode request or prefill block. All tensors are int32 on the device.

    A row attends to positions [0, num_sink), to ``num_chosen`` candidates, and to
    [tail_start, kv_end). Its candidates are the positions [num_sink, num_sink + num_candidates).

    Attributes:
        num_candidates: [num_rows], 0 where nothing is to be scored.
        num_chosen: [num_rows], at most num_candidates, or the length of the cached vote.
        tail_start: [num_rows], position.
        kv_end: [num_rows], position after the last one attended.
        cached: [num_rows], 1 where the chosen come from the selection cache.
    """

    num_candidates: torch.Tensor
    num_chosen: torch.Tensor
    tail_start: torch.Tensor
    kv_end: torch.Tensor
    cached: torch.Tensor

    @classmethod
    def empty(cls, max_rows: int, device: torch.device | str) -> SelectionRows:
        """Uninitialised rows for :func:`begin_decode` to fill."""
        return cls(*torch.empty(5, max_rows, dtype=torch.int32, device=device))

    def of(self, rows: range) -> SelectionRows:
        """Some of the rows, neighbours, as views."""
        return SelectionRows(*(getattr(self, field.name)[rows.start : rows.stop] for field in fields(self)))


def rows_block(num_rows: int) -> int:
    """The block of rows that a kernel is compiled for, ``num_rows`` or more: few sizes, so few compilations."""
    return next((size for size in (16, 256, 4096) if num_rows <= size), triton.next_power_of_2(num_rows))


@triton.jit
def _own_tiles(num_candidates_ptr, shared_tiles_ptr, num_rows, ROWS: tl.constexpr, TILE: tl.constexpr):
    """Tiles of the first ``num_rows`` rows, less those that a row shares with others: [ROWS].

    A row that does not vote has no candidates, and so no tiles, whatever it shares.
    """
    rows = tl.arange(0, ROWS)
    # Kernels ask before they wait for the launch before them; see launch.py.
    num_candidates = tl.load(num_candidates_ptr + rows, mask=rows < num_rows, other=0, cache_modifier=".cg")
    tiles = tl.cdiv(num_candidates, TILE)
    if shared_tiles_ptr is not None:
        tiles = tl.maximum(tiles - tl.load(shared_tiles_ptr + rows, mask=rows < num_rows, other=0), 0)
    return tiles


@triton.jit
def row_tiles(num_candidates_ptr, shared_tiles_ptr, num_rows, ROWS: tl.constexpr, TILE: tl.constexpr):
    """Layout of the terms: the first of each row's own tiles and the one after its last, rows in order: [ROWS] each."""
    tiles = _own_tiles(num_candidates_ptr, shared_tiles_ptr, num_rows, ROWS, TILE)
    end = tl.cumsum(tiles)
    return end - tiles, end


@triton.jit
def first_own_tile_of(row, num_candidates_ptr, shared_tiles_ptr, ROWS: tl.constexpr, TILE: tl.constexpr):
    """First tile of one row in that layout."""
    return tl.sum(_own_tiles(num_candidates_ptr, shared_tiles_ptr, row, ROWS, TILE))


@triton.jit
def first_tile_of(row, num_candidates_ptr, ROWS: tl.constexpr, TILE: tl.constexpr):
    """Layout of scores and slots: the first of a row's tiles, those that it shares included."""
    return tl.sum(_own_tiles(num_candidates_ptr, None, row, ROWS, TILE))
