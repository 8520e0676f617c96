# SPDX-License-Identifier: Apache-2.0
"""Which tiles of a decode step are scored for several rows at once: host work, once per step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from .shared_segment import MAX_MEMBERS, MAX_SEGMENTS, SharedSegment
from .transfer import aligned, int32
from .workspace import TILE

NONE = -1


_SIZES = (MAX_MEMBERS, MAX_SEGMENTS + 1, 2 * MAX_SEGMENTS, MAX_SEGMENTS)
_STARTS = (0, *accumulate(map(aligned, _SIZES)))


@dataclass(frozen=True)
class SharedPrefixes:
    """The shared segments of a decode step as kernels read them. All tensors are int32; graphs rewrite them in place.

    Attributes:
        members: [MAX_MEMBERS] rows, segment after segment; behind the last one, anything.
        indptr: [MAX_SEGMENTS + 1] where each segment's members begin; a segment that does not exist has none.
        tiles: [2 * MAX_SEGMENTS] the first tile of each segment's candidates, then the one after the last of each.
        parent: [MAX_SEGMENTS] the segment that ends where this one begins, for all of its members; -1: none.
        shared_tiles: [num_rows] tiles at the front of each row's candidates that lie in segments.
        segment: [num_rows] the last segment of each row; -1: none.
    """

    members: torch.Tensor
    indptr: torch.Tensor
    tiles: torch.Tensor
    parent: torch.Tensor
    shared_tiles: torch.Tensor
    segment: torch.Tensor

    @classmethod
    def view(cls, memory: torch.Tensor, num_rows: int) -> SharedPrefixes:
        """Views of [>= :meth:`count_ints`] int32, so that one copy moves all."""
        pieces = (memory[start : start + size] for start, size in zip(_STARTS, _SIZES, strict=False))
        members, indptr, tiles, parent = pieces
        rows = memory[_STARTS[-1] :]
        return cls(members, indptr, tiles, parent, rows[:num_rows], rows[aligned(num_rows) :][:num_rows])

    @staticmethod
    def count_ints(num_rows: int) -> int:
        return _STARTS[-1] + 2 * aligned(num_rows)


@dataclass(frozen=True)
class TileSegment:
    """Rows that share the tiles [first_tile, end_tile) of their candidates, and the index of the segment before."""

    rows: tuple[int, ...]
    first_tile: int
    end_tile: int
    parent: int


@dataclass(frozen=True)
class SharedPlan:
    """What rows share, on the host. `shared_tiles` and `segment`: see :class:`SharedPrefixes`."""

    segments: tuple[TileSegment, ...]
    shared_tiles: tuple[int, ...]
    segment: tuple[int, ...]

    @classmethod
    def empty(cls, num_rows: int) -> SharedPlan:
        return cls((), (0,) * num_rows, (NONE,) * num_rows)

    @classmethod
    def of(
        cls, segments: Sequence[SharedSegment], num_candidates: Sequence[int], *, num_sink: int, min_rows: int
    ) -> SharedPlan:
        """In whole tiles, and only where each row has candidates.

        Args:
            segments: of the requests of the step.
            num_candidates: of each row at most; 0 for a row that does not vote.
            min_rows: rows with candidates that a segment needs, 2 at least.

        Raises:
            ValueError: more segments or members than the kernels hold.
        """
        members = sum(len(segment.rows) for segment in segments)
        if len(segments) > MAX_SEGMENTS or members > MAX_MEMBERS:
            expected = f"at most {MAX_SEGMENTS} with {MAX_MEMBERS} members"
            raise ValueError(f"segments: expected {expected}, got {len(segments)} with {members}")
        planned: list[TileSegment] = []
        tiles, last = [0] * len(num_candidates), [NONE] * len(num_candidates)
        for segment in segments:
            rows = tuple(row for row in segment.rows if num_candidates[row])
            if len(rows) < min_rows:
                continue
            # The rows of a segment have all segments before it in common.
            first, parent = tiles[rows[0]], last[rows[0]]
            end = min(segment.end - num_sink, *(num_candidates[row] for row in rows)) // TILE
            if end <= first:
                continue
            for row in rows:
                tiles[row], last[row] = end, len(planned)
            planned.append(TileSegment(rows, first, end, parent))
        return cls(tuple(planned), tuple(tiles), tuple(last))

    def part(self, rows: range) -> SharedPlan:
        """For some of the rows, neighbours, counted from the first of them."""
        segments = []
        for segment in self.segments:
            inside = tuple(row - rows.start for row in segment.rows if row in rows)
            segments.append(TileSegment(inside, segment.first_tile, segment.end_tile, segment.parent))
        return SharedPlan(
            tuple(segments), self.shared_tiles[rows.start : rows.stop], self.segment[rows.start : rows.stop]
        )

    def write(self, memory: torch.Tensor) -> None:
        """For :meth:`SharedPrefixes.view` of the same memory, or of a copy: [count_ints] int32 on the host."""
        out = SharedPrefixes.view(memory, len(self.segment))
        count = len(self.segments)
        members = [row for segment in self.segments for row in segment.rows]
        ends = list(accumulate(len(segment.rows) for segment in self.segments))
        out.members[: len(members)] = int32(members)
        out.indptr[: count + 1] = int32([0, *ends])
        out.indptr[count + 1 :] = len(members)
        out.tiles[:count] = int32([segment.first_tile for segment in self.segments])
        out.tiles[MAX_SEGMENTS:][:count] = int32([segment.end_tile for segment in self.segments])
        # No members, so no work; but the kernels do arithmetic with their tiles.
        out.tiles[count:MAX_SEGMENTS] = 0
        out.tiles[MAX_SEGMENTS + count :] = 0
        out.parent[:count] = int32([segment.parent for segment in self.segments])
        out.shared_tiles[:] = int32(self.shared_tiles)
        out.segment[:] = int32(self.segment)
