# SPDX-License-Identifier: Apache-2.0
"""Which requests of a forward have the same keys, and where."""

from __future__ import annotations

from dataclasses import dataclass

MAX_SEGMENTS = 64
"""Segments of a forward, at most."""

MAX_MEMBERS = 2048
"""Requests of all segments of a forward, each counted in every segment that contains it, at most."""


@dataclass(frozen=True)
class SharedSegment:
    """Positions of several requests that lie in the same slots: part of a prefix that the radix cache shares.

    The segments of a forward are given parents before children. What contains a request is nested: of two segments
    with a request in common, the later one's requests are all in the earlier one, and it begins where that ends,
    or where one between them does. So a request's segments cover its positions from 0 on, without holes.

    Attributes:
        rows: indices of the requests in the forward, ascending, two at least.
        start, end: positions [start, end).
    """

    rows: tuple[int, ...]
    start: int
    end: int
