# SPDX-License-Identifier: Apache-2.0
"""Running requests that share a long prefix, so that it is scored once for all of them. Host work, once per forward."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from sglang_tokenselect.kernels.shared_segment import MAX_MEMBERS, MAX_SEGMENTS, SharedSegment
from sglang_tokenselect.radix_chains import IdTree, Links, NodeIds, NodeTree, reader_of

MIN_TOKENS = 2048
"""A shorter prefix is not worth a segment of its own."""

GRANULE = 1024
"""Segments begin and end at multiples of so many tokens, so none is shorter."""

REMEMBERED = 2
"""Batches whose segments are kept: decode steps alternate with the chunks of a prefill."""

Segments = tuple[SharedSegment, ...]


class PrefixGroups:
    """Which requests of a forward share how much.

    The answer depends on the requests' last nodes alone (radix_chains.py says why), so as long as these are the same
    in the same order, it is the one given before.

    Args:
        min_requests: as many as must share a part of their prefixes; 0 never, else 2 at least.
        min_saved: tokens that all segments of a forward must save, see :func:`saved_tokens`.
    """

    def __init__(self, min_requests: int, min_saved: int) -> None:
        self._min_requests, self._min_saved = min_requests, min_saved
        self._tree_cache: Any = None
        self._reader: NodeTree | IdTree | None = None
        self._known: dict[NodeIds, Segments] = {}

    def find(self, reqs: Sequence[Any], tree_cache: Any) -> Segments:
        """
        Args:
            reqs: SGLang's Req of each row of the forward, in order.
            tree_cache: SGLang's cache of prefixes; None: none.

        Returns:
            At most MAX_SEGMENTS with MAX_MEMBERS requests in all.
        """
        if not 0 < self._min_requests <= len(reqs):
            return ()
        if tree_cache is not self._tree_cache or (self._reader is not None and self._reader.is_reset):
            self._tree_cache, self._reader, self._known = tree_cache, reader_of(tree_cache), {}
        if self._reader is None:
            return ()
        ids = self._reader.ids(reqs)
        if (segments := self._known.pop(ids, None)) is None:
            segments = limited(shared_segments(ids, self._reader.links(reqs), self._min_requests))
            segments = segments if sum(map(saved_tokens, segments)) >= self._min_saved else ()
            if len(self._known) == REMEMBERED:
                del self._known[next(iter(self._known))]
        self._known[ids] = segments  # the last one of the dict was used last
        return segments


def saved_tokens(segment: SharedSegment) -> int:
    """Readings of a token's keys that sharing saves in a layer of decode: two serve all requests of a segment."""
    return (len(segment.rows) - 2) * (segment.end - segment.start)


@dataclass(slots=True)
class _Group:
    """Requests that share a part of the tree which no other request shares.

    Attributes:
        before: the group whose part ends where this one's begins, all of these requests in it; None: there is none.
        count: of requests.
        start, end: positions.
        rows: the requests, ascending, once all are known.
    """

    before: _Group | None
    count: int
    start: int
    end: int
    rows: list[int] = field(default_factory=list)


def shared_segments(ids: NodeIds, links: Links, min_requests: int) -> list[SharedSegment]:
    """All of them, parents before children.

    Boundaries are moved towards the root: behind one, the requests of the next segment still share what those of the
    segment before do.
    """
    counts = _requests_below(ids, links)
    groups: list[_Group] = []
    group_of: dict[int | None, _Group | None] = {}
    for node, parent in links.parents.items():
        group = group_of.get(parent)
        if counts[node] >= min_requests:
            if group is None or counts[node] < group.count:
                group = _Group(group, counts[node], 0 if group is None else group.end, links.ends[node])
                groups.append(group)
            else:
                group.end = links.ends[node]
        group_of[node] = group
    for row, last in enumerate(ids):
        group = group_of.get(last)
        while group is not None:
            group.rows.append(row)
            group = group.before
    cut = [(group.rows, _floored(group.start), _floored(group.end)) for group in groups]
    return [SharedSegment(tuple(rows), start, end) for rows, start, end in cut if start < end]


def _requests_below(ids: NodeIds, links: Links) -> dict[int, int]:
    """Requests whose chain contains a node, for each node of `links`."""
    counts = dict.fromkeys(links.parents, 0)
    for node in ids:
        if node in counts:
            counts[node] += 1
    for node, parent in reversed(links.parents.items()):
        if parent in counts:
            counts[parent] += counts[node]
    return counts


def _floored(position: int) -> int:
    return 0 if position < MIN_TOKENS else position // GRANULE * GRANULE


def limited(segments: list[SharedSegment]) -> Segments:
    """Without those that save least, up to the limits; none that another one continues, so no request gets a hole."""
    num_segments, num_members = len(segments), sum(len(segment.rows) for segment in segments)
    if num_segments <= MAX_SEGMENTS and num_members <= MAX_MEMBERS:
        return tuple(segments)
    before = _indices_before(segments)
    num_after = Counter(before)
    last = [(saved_tokens(segments[i]), i) for i in range(len(segments)) if not num_after[i]]
    heapq.heapify(last)
    dropped = set()
    while num_segments > MAX_SEGMENTS or num_members > MAX_MEMBERS:
        _, index = heapq.heappop(last)
        dropped.add(index)
        num_segments, num_members = num_segments - 1, num_members - len(segments[index].rows)
        if (parent := before[index]) is not None:
            num_after[parent] -= 1
            if not num_after[parent]:
                heapq.heappush(last, (saved_tokens(segments[parent]), parent))
    return tuple(segment for index, segment in enumerate(segments) if index not in dropped)


def _indices_before(segments: list[SharedSegment]) -> list[int | None]:
    """Of each segment, the one that it continues; None: it begins at 0."""
    last_of_row: dict[int, int] = {}
    before = []
    for index, segment in enumerate(segments):
        before.append(last_of_row.get(segment.rows[0]))
        last_of_row.update(dict.fromkeys(segment.rows, index))
    return before
