# SPDX-License-Identifier: Apache-2.0
"""The order in which a prefill's blocks share the keys that their requests have in common."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise, takewhile

from .block_plan import KEY_QUANTUM
from .shared_segment import SharedSegment


def order_blocks(
    req_pool_indices: Sequence[int], num_candidates: Sequence[int], shared: Sequence[SharedSegment], *, num_sink: int
) -> tuple[list[int], list[int]]:
    """Brings together the blocks that have candidates in common.

    Args:
        req_pool_indices: [num_blocks], whose each block is.
        num_candidates: [num_blocks], of positions from ``num_sink`` on.
        shared: segments whose ``rows`` are values of ``req_pool_indices``.

    Returns:
        order: [num_blocks] indices of the blocks; those that share with nobody first. As given where nobody does.
        num_common: [num_blocks - 1], for :func:`plan_blocks` of the blocks in that order; empty if no requests share.
    """
    # Rounded down, so that key tiles are whole. What is left out there is shared as well: it may count as one's own.
    begins, ends = (
        [max(position - num_sink, 0) // KEY_QUANTUM * KEY_QUANTUM for position in positions]
        for positions in ([segment.start for segment in shared], [segment.end for segment in shared])
    )
    segments_of = defaultdict(list)
    for index, segment in enumerate(shared):
        for req in segment.rows:
            segments_of[req].append(index)
    # The path of a block from the root to the last segment in which it has candidates.
    paths = [
        [index for index in segments_of[req] if begins[index] < count]
        for req, count in zip(req_pool_indices, num_candidates, strict=True)
    ]
    order = sorted(range(len(paths)), key=paths.__getitem__)
    num_common = [
        _last_common(paths[a], paths[b], ends) if req_pool_indices[a] != req_pool_indices[b] else 0
        for a, b in pairwise(order)
    ]
    return order, num_common if any(num_common) else []


def _last_common(path: Sequence[int], other: Sequence[int], ends: Sequence[int]) -> int:
    """Where the last segment of both paths ends; 0: they have none."""
    common = takewhile(lambda pair: pair[0] == pair[1], zip(path, other, strict=False))
    return max((ends[index] for index, _ in common), default=0)
