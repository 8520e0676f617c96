# SPDX-License-Identifier: Apache-2.0
"""SGLang's radix trees, as far as running requests hang on them: one reader for each kind.

A request's `last_node` is where the part of its prompt ends that the tree holds, and its row of `req_to_token` has the
tree's own slots up to there, at every moment at which a forward is made:

- Whoever matches or inserts a prompt sets `last_node` and writes these slots into the row in one go, before the next
  forward is made: chunks of a prefill when they are put back into the queue, whole prompts when their result is
  processed. The rows up to an earlier `last_node` are not written again, so a forward that is still in flight (overlap
  scheduling) reads what it was told.
- A decode step that is launched before its prefill's result was processed finds the shorter prefix that was matched.
- While a request runs, its chain is locked: never evicted. Other requests may split its nodes. The deeper part keeps
  the id, so the tokens up to an id, and up to where two ids part, stay the same for life.
- A retracted request has no node; it gets one when it is matched again.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

logger = logging.getLogger(__name__)

NodeIds = tuple[int | None, ...]
"""Of each request in turn, the node that its `last_node` names; None: it has none in the tree."""


class Links(NamedTuple):
    """Nodes of the tree by id, parents before children; the root is not among them.

    Two dicts of integers: an object for each of ten thousand nodes would be work for the garbage collector.

    Attributes:
        parents: the id of each one's parent, the root's included.
        ends: tokens from the root to each one's last.
    """

    parents: dict[int, int]
    ends: dict[int, int]

    @classmethod
    def empty(cls) -> Links:
        return cls({}, {})


class NodeTree:
    """RadixCache and its kin: requests hold nodes, objects with `id`, `parent` (None: the root) and `key`."""

    def __init__(self, tree_cache: Any) -> None:
        self._tree_cache = tree_cache
        self._root = weakref.ref(tree_cache.root_node)

    @property
    def is_reset(self) -> bool:
        """Since this reader was made. HiRadixCache then counts ids from 0 again."""
        return self._root() is not self._tree_cache.root_node

    def ids(self, reqs: Sequence[Any]) -> NodeIds:
        # Streaming sessions hold an object without an id, on which nothing hangs.
        return tuple([getattr(req.last_node, "id", None) for req in reqs])

    def links(self, reqs: Sequence[Any]) -> Links:
        links = Links.empty()
        for req in reqs:
            if hasattr(req.last_node, "id"):
                add_chain(req.last_node, links)
        return links


class IdTree:
    """UnifiedRadixCache: requests hold ids, which are never given twice, and its core tells their nodes."""

    is_reset = False

    def __init__(self, tree_cache: Any) -> None:
        self._core = tree_cache.tree_core

    def ids(self, reqs: Sequence[Any]) -> NodeIds:
        return tuple([node if isinstance(node := req.last_node, int) else None for req in reqs])

    def links(self, reqs: Sequence[Any]) -> Links:
        ids = dict.fromkeys(node for node in self.ids(reqs) if node is not None)
        links = Links.empty()
        if not hasattr(self._core, "collect_path_info"):  # SGLang 0.5.17
            for node in ids:
                add_chain(self._core.node_by_id(node), links)
            return links
        for path in self._core.collect_path_info(list(ids)):
            add_path(path, links)
        return links


def add_chain(node: Any, links: Links) -> None:
    """Adds a node and its ancestors, up to the first that is there already."""
    parents, ends = links
    added = []
    while (parent := node.parent) is not None and node.id not in ends:
        added.append(node)
        node = parent
    end = ends.get(node.id, 0)
    for node in reversed(added):
        end += len(node.key)
        parents[node.id], ends[node.id] = node.parent.id, end


def add_path(path: Iterable[Any], links: Links) -> None:
    """Adds SGLang's `TreePathNodeInfo`s from the root on."""
    parents, ends = links
    for info in path:
        if info.node_id not in ends:
            parents[info.node_id], ends[info.node_id] = info.parent_id, info.path_end


def reader_of(tree_cache: Any) -> NodeTree | IdTree | None:
    """None: a cache that shares nothing, or of an unknown kind, which is logged."""
    if tree_cache is None or getattr(tree_cache, "disable", False):
        return None
    tree_cache = getattr(tree_cache, "inner", tree_cache)  # StreamingSession around a RadixCache
    if hasattr(tree_cache, "tree_core"):
        return IdTree(tree_cache)
    root = getattr(tree_cache, "root_node", None)
    if all(hasattr(root, name) for name in ("id", "parent", "key")):
        return NodeTree(tree_cache)
    logger.warning(
        "TokenSelect: %s is not a radix tree known here; shared prefixes are scored for each request apart",
        type(tree_cache).__name__,
    )
    return None
