# SPDX-License-Identifier: Apache-2.0
"""Random trees of requests that share parts of their prefix, as a radix cache makes them."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from sglang_tokenselect.kernels.shared_segment import SharedSegment


def random_segments(choose: random.Random, lengths: Sequence[int]) -> list[SharedSegment]:
    """Groups that part at random depths; some share as much as the shortest of them has.

    Args:
        lengths: positions that each request may share.
    """
    segments: list[SharedSegment] = []

    def part(rows: list[int], start: int) -> None:
        if len(rows) < 2 or (most := min(lengths[row] for row in rows)) <= start:
            return
        end = choose.choice([choose.randint(start + 1, most), most])
        segments.append(SharedSegment(tuple(sorted(rows)), start, end))
        choose.shuffle(rows)
        cuts = sorted(choose.choices(range(len(rows) + 1), k=2))
        for first, last in zip([0, *cuts], [*cuts, len(rows)], strict=True):
            part(rows[first:last], end)

    rows = list(range(len(lengths)))
    choose.shuffle(rows)
    alone = choose.randint(0, len(rows) // 3)
    part(rows[alone:], 0)
    return segments


def share_slots(table: torch.Tensor, segments: Sequence[SharedSegment]) -> None:
    """Gives the rows of [num_rows, max_len] the slots that they have in common, those of the first of them."""
    for segment in segments:
        span = slice(segment.start, segment.end)
        table[list(segment.rows), span] = table[segment.rows[0], span].clone()
