# SPDX-License-Identifier: Apache-2.0
"""Groups of requests that share a prefix, against the slots that SGLang's own radix trees give them."""

from __future__ import annotations

import importlib.util
from array import array
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prefix_oracle import assert_nested, expected_segments
from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator
from sglang.srt.mem_cache.base_prefix_cache import EvictParams, InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.cache_init_params import CacheInitParams
from sglang.srt.mem_cache.memory_pool import ReqToTokenPool
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey
from sglang.srt.mem_cache.unified_cache.components import ComponentType
from sglang.srt.mem_cache.unified_radix_cache import UnifiedRadixCache

from sglang_tokenselect import prefix_groups
from sglang_tokenselect.backend import TokenSelectAttnBackend
from sglang_tokenselect.config import TokenSelectConfig
from sglang_tokenselect.counters import Counters
from sglang_tokenselect.kernels.shared_segment import MAX_MEMBERS, MAX_SEGMENTS, SharedSegment
from sglang_tokenselect.planner import PADDING_ROW, ForwardPlan, RequestPlan
from sglang_tokenselect.prefix_groups import PrefixGroups, limited
from sglang_tokenselect.radix_chains import Links, add_chain

CORES = ("rust", "python") if importlib.util.find_spec("sglang.srt.mem_cache.rust_tree_core") else (None,)
TREES = ("RadixCache", *(f"UnifiedRadixCache {core}" for core in CORES))
UNIT, LONGEST, MOST_REQUESTS = 640, 8, 10
"""Prompts are runs of `UNIT` equal tokens, at most `LONGEST` of them."""


def make_tree(kind, *, disable=False):
    pool = ReqToTokenPool(MOST_REQUESTS + 1, UNIT * LONGEST, device="cpu", enable_memory_saver=False)
    allocator = TokenToKVPoolAllocator(150_000, dtype=torch.int8, device="cpu", kvcache=None, need_sort=False)
    params = CacheInitParams(disable, pool, allocator, page_size=1)
    if kind == "RadixCache":
        return RadixCache(params)
    params.tree_components = (ComponentType.FULL,)
    core = kind.split()[1]
    if core != "None":
        params.tree_core_backend = core
    return UnifiedRadixCache(params)


class Traffic:
    """Requests that come, are published to a tree as SGLang does it, and go."""

    def __init__(self, kind):
        self.tree = make_tree(kind)
        self.reqs = []

    def match(self, tokens):
        """The node where `tokens` end in the tree, and the tree's slots up to there."""
        node = self.tree.match_prefix(MatchPrefixParams(key=RadixKey(array("q", tokens)))).last_device_node
        if hasattr(self.tree, "path_device_indices"):
            return node, self.tree.path_device_indices(node)
        return node, self.tree.match_prefix(MatchPrefixParams(key=RadixKey(array("q", tokens)))).device_indices

    def hold(self, req, node):
        lock = self.tree.lock(node) if hasattr(self.tree, "lock") else self.tree.inc_lock_ref(node)
        self.release(req)
        req.last_node, req.lock = node, lock

    def release(self, req):
        if req.last_node is not None:
            if hasattr(self.tree, "unlock"):
                self.tree.unlock(req.lock)
            else:
                self.tree.dec_lock_ref(req.last_node)
        req.last_node = None

    def join(self, tokens):
        node, prefix = self.match(tokens[:-1])
        own = self.tree.token_to_kv_pool_allocator.alloc(len(tokens) - len(prefix))
        slots = torch.cat([prefix.to(torch.int64), own.to(torch.int64)])
        req = SimpleNamespace(tokens=tokens, slots=slots, last_node=None, lock=None)
        self.hold(req, node)
        self.reqs.append(req)

    def publish(self, req):
        """As `cache_unfinished_req`: the tree keeps the slots that it had, and the row gets them."""
        self.tree.insert(InsertParams(key=RadixKey(array("q", req.tokens)), value=req.slots.clone()))
        node, slots = self.match(req.tokens)
        req.slots = slots.to(torch.int64).clone()
        self.hold(req, node)

    def step(self, operation, tokens, number):
        req = self.reqs[number % len(self.reqs)] if self.reqs else None
        if operation in ("join", "serve") and len(self.reqs) < MOST_REQUESTS:
            self.join(tokens)
            if operation == "serve":
                self.publish(self.reqs[-1])
        elif operation == "look":
            self.match(tokens)
        elif operation == "evict":
            self.tree.evict(EvictParams(num_tokens=len(tokens)))
        elif operation == "publish" and req is not None and req.last_node is not None:
            self.publish(req)
        elif operation == "leave" and req is not None:
            self.release(req)
            self.reqs.pop(number % len(self.reqs))
        elif operation == "retract" and req is not None:
            self.release(req)
            req.slots = torch.empty(0, dtype=torch.int64)


def prompt(symbols, cut=0):
    return [symbol for symbol in symbols for _ in range(UNIT)][: len(symbols) * UNIT - cut]


PROMPTS = st.builds(
    lambda stem, fork, cut: prompt([3] * stem + fork, cut),
    st.integers(0, 6),
    st.lists(st.sampled_from([3, 4]), min_size=1, max_size=LONGEST - 6),
    st.integers(0, UNIT - 2),
)
OPERATIONS = st.sampled_from(["serve", "serve", "serve", "join", "publish", "look", "evict", "leave", "retract"])


@pytest.mark.parametrize("kind", TREES)
@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(OPERATIONS, PROMPTS, st.integers(0, 9)), min_size=8, max_size=24),
    st.sampled_from([2, 3]),
)
def test_groups_are_those_of_equal_slots_whatever_happened_before(kind, steps, min_requests):
    traffic, groups = Traffic(kind), PrefixGroups(min_requests, 0)
    for step in steps:
        traffic.step(*step)
        found = groups.find(traffic.reqs, traffic.tree)
        assert set(found) == expected_segments([req.slots for req in traffic.reqs], min_requests)
        assert_nested(found)
        assert found == PrefixGroups(min_requests, 0).find(traffic.reqs, traffic.tree)


def published(kind, prompts):
    traffic = Traffic(kind)
    for tokens in prompts:
        traffic.join(tokens)
        traffic.publish(traffic.reqs[-1])
    return traffic


@pytest.mark.parametrize("kind", TREES)
def test_a_tree_of_requests(kind):
    """A prefix of 5 units for all; two forks behind it, one of them too short to tell."""
    stem = prompt([3] * 5)
    traffic = published(kind, [stem + prompt([4, 4]), stem + prompt([5]), stem + prompt([4, 4]), stem + prompt([5])])
    assert PrefixGroups(2, 0).find(traffic.reqs, traffic.tree) == (
        SharedSegment((0, 1, 2, 3), 0, 3072),
        SharedSegment((0, 2), 3072, 4096),
    )
    assert PrefixGroups(3, 0).find(traffic.reqs, traffic.tree) == (SharedSegment((0, 1, 2, 3), 0, 3072),)
    assert (
        PrefixGroups(5, 0).find(traffic.reqs, traffic.tree) == PrefixGroups(0, 0).find(traffic.reqs, traffic.tree) == ()
    )


@pytest.mark.parametrize("kind", TREES)
def test_a_system_prompt_that_is_too_short_does_not_hide_what_is_longer(kind):
    short = prompt([3, 3])
    traffic = published(kind, [short + prompt([symbol] * 3) for symbol in (4, 5, 4, 5)])
    found = PrefixGroups(2, 0).find(traffic.reqs, traffic.tree)
    assert set(found) == {SharedSegment((0, 2), 0, 3072), SharedSegment((1, 3), 0, 3072)}


@pytest.mark.parametrize("kind", TREES)
def test_nothing_is_read_while_the_nodes_stay(kind):
    """Not even when steps of decode alternate with the forwards of others."""
    traffic, groups = published(kind, [prompt([3] * 5)] * 4), PrefixGroups(2, 0)
    decode, extend = traffic.reqs, traffic.reqs[:2]
    found = [groups.find(reqs, traffic.tree) for reqs in (decode, extend)]
    assert [len(segments) for segments in found] == [1, 1]
    groups._reader.links = None
    for _ in range(3):
        assert [groups.find(reqs, traffic.tree) for reqs in (decode, extend)] == found
    with pytest.raises(TypeError):
        groups.find(traffic.reqs[1:], traffic.tree)


def test_the_same_nodes_in_another_order_are_other_rows():
    traffic, groups = published(TREES[0], [prompt([3] * 5), prompt([3] * 5), prompt([4] * 5)]), PrefixGroups(2, 0)
    for rows, order in (((0, 1), [0, 1, 2]), ((1, 2), [2, 0, 1]), ((0, 2), [0, 2, 1])):
        [segment] = groups.find([traffic.reqs[index] for index in order], traffic.tree)
        assert segment.rows == rows


def test_no_more_than_a_few_answers_are_kept():
    traffic, groups = published(TREES[0], [prompt([3] * 5)] * 6), PrefixGroups(2, 0)
    for count in (2, 3, 4, 5, 6):
        groups.find(traffic.reqs[:count], traffic.tree)
    assert len(groups._known) == prefix_groups.REMEMBERED


class Node:
    """As SGLang's TreeNode; counts how often its length was asked."""

    def __init__(self, id, parent, length):
        self.id, self.parent, self.length, self.asked = id, parent, length, 0

    @property
    def key(self):
        self.asked += 1
        return range(self.length)


def chain(root, first_id, lengths):
    nodes = [root]
    for offset, length in enumerate(lengths):
        nodes.append(Node(first_id + offset, nodes[-1], length))
    return nodes[1:]


def test_each_node_is_visited_once():
    root = Node(0, None, 0)
    stem = chain(root, 1, [10] * 20)
    leaves = [Node(100 + n, stem[-1], 5) for n in range(4)]
    links = Links.empty()
    for leaf in (*leaves, stem[3], root):
        add_chain(leaf, links)
    assert [node.asked for node in (*stem, *leaves)] == [1] * 24
    assert [links.ends[leaf.id] for leaf in leaves] == [205] * 4 and root.id not in links.ends
    assert list(links.parents)[:20] == [node.id for node in stem]


def holders(*nodes):
    return [SimpleNamespace(last_node=node) for node in nodes]


def test_ids_that_begin_anew_are_other_nodes():
    """As after a flush of HiRadixCache, whose nodes then count from 0 again."""
    tree, groups = SimpleNamespace(root_node=Node(0, None, 0)), PrefixGroups(2, 0)
    for length in (2048, 4096):
        tree.root_node = Node(0, None, 0)
        node = Node(1, tree.root_node, length)
        assert groups.find(holders(node, node), tree) == (SharedSegment((0, 1), 0, length),)


@pytest.mark.parametrize("kind", TREES)
def test_a_flushed_tree_is_read_anew(kind):
    traffic, groups = published(kind, [prompt([3] * 5)] * 2), PrefixGroups(2, 0)
    [before] = groups.find(traffic.reqs, traffic.tree)
    traffic.tree.reset()
    traffic.reqs.clear()
    for _ in range(2):
        traffic.join(prompt([3] * 7))
        traffic.publish(traffic.reqs[-1])
    [after] = groups.find(traffic.reqs, traffic.tree)
    assert (before.end, after.end) == (3072, 4096)


def test_too_many_segments_lose_those_that_save_least():
    """Pairs of one prompt each, the later ones longer."""
    tree = SimpleNamespace(root_node=Node(0, None, 0))
    pairs = [Node(1 + n, tree.root_node, 2048 + 1024 * n) for n in range(MAX_SEGMENTS + 6)]
    found = PrefixGroups(2, 0).find(holders(*pairs, *pairs), tree)
    assert len(found) == MAX_SEGMENTS
    assert min(segment.end for segment in found) == 2048 + 1024 * 6


def test_too_many_members_lose_the_last_parts_first():
    """Six parts of 400 requests each, or of fewer: the sums are over the limit from the sixth on."""
    segments = [SharedSegment(tuple(range(400 - n)), 4096 * n, 4096 * (n + 1)) for n in range(6)]
    kept = limited(segments)
    assert kept == tuple(segments[:5]) and sum(len(segment.rows) for segment in kept) <= MAX_MEMBERS
    assert limited([SharedSegment(tuple(range(MAX_MEMBERS + 1)), 0, 4096)]) == ()


def test_a_part_goes_before_the_one_that_it_continues():
    """Though it saves more."""
    half = MAX_MEMBERS // 2
    short, long = SharedSegment(tuple(range(half + 1)), 0, 2048), SharedSegment(tuple(range(half)), 2048, 90112)
    assert limited([short, long]) == (short,)
    wide = SharedSegment(tuple(range(MAX_MEMBERS + 1)), 0, 2048)
    assert limited([wide, SharedSegment((0, 1), 2048, 4096)]) == ()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 30), st.sampled_from([600, 1024, 3000])), max_size=200), st.data())
def test_limits_leave_no_holes(tree_shape, data):
    root = Node(0, None, 0)
    nodes = [root]
    for parent, length in tree_shape:
        nodes.append(Node(len(nodes), nodes[parent % len(nodes)], length))
    held = data.draw(st.lists(st.sampled_from(nodes), min_size=2, max_size=700))
    with mock.patch.object(prefix_groups, "MAX_SEGMENTS", 5), mock.patch.object(prefix_groups, "MAX_MEMBERS", 100):
        found = PrefixGroups(2, 0).find(holders(*held), SimpleNamespace(root_node=root))
    assert_nested(found)
    assert len(found) <= 5 and sum(len(segment.rows) for segment in found) <= 100


@pytest.mark.parametrize("kind", TREES)
def test_requests_without_a_node_share_nothing(kind):
    traffic = published(kind, [prompt([3] * 5)] * 4)
    traffic.step("retract", [], 1)
    traffic.reqs[2].last_node = object()  # of a streaming session
    assert PrefixGroups(2, 0).find(traffic.reqs, traffic.tree) == (SharedSegment((0, 3), 0, 3072),)


def test_caches_that_share_nothing(caplog):
    reqs = holders(None, None)
    caches = [None, SimpleNamespace(disable=True), *(make_tree(kind, disable=True) for kind in TREES)]
    assert [PrefixGroups(2, 0).find(reqs, cache) for cache in caches] == [()] * len(caches)
    if importlib.util.find_spec("sglang.srt.mem_cache.chunk_cache"):  # SGLang 0.5.17
        from sglang.srt.mem_cache.chunk_cache import ChunkCache

        assert PrefixGroups(2, 0).find(reqs, ChunkCache(CacheInitParams(True, None, None, page_size=1))) == ()
    assert not [record for record in caplog.records if "TokenSelect" in record.message]


def test_an_unknown_tree_is_told_once(caplog):
    groups, tree = PrefixGroups(2, 0), SimpleNamespace(root_node=object())
    for _ in range(3):
        assert groups.find(holders(object(), object()), tree) == ()
    assert caplog.text.count("SimpleNamespace is not a radix tree known here") == 1


def test_what_sharing_does_not_pay_for_is_not_shared():
    """Four requests that share 3,072 tokens, of which two readings stay."""
    traffic = published(TREES[0], [prompt([3] * 5)] * 4)
    assert PrefixGroups(2, 2 * 3072).find(traffic.reqs, traffic.tree) == (SharedSegment((0, 1, 2, 3), 0, 3072),)
    assert PrefixGroups(2, 2 * 3072 + 1).find(traffic.reqs, traffic.tree) == ()


def test_all_groups_of_a_forward_save_together():
    traffic = published(TREES[0], [prompt([3] * 5)] * 3 + [prompt([4] * 5)] * 4)
    segments = {SharedSegment((0, 1, 2), 0, 3072), SharedSegment((3, 4, 5, 6), 0, 3072)}
    assert set(PrefixGroups(3, 3 * 3072).find(traffic.reqs, traffic.tree)) == segments
    assert PrefixGroups(3, 3 * 3072 + 1).find(traffic.reqs, traffic.tree) == ()


def test_queries_that_share_are_counted():
    """Three of five requests share; one of these is dense, as is one of the others, and one row only pads."""
    config = TokenSelectConfig(sink=2, budget=5, local=3, min_len=0)
    lengths = [(1, 50), (2, 10), (3, 50), (4, 50), (5, 10), (PADDING_ROW, 1)]
    requests = tuple(RequestPlan(row, length, row, 1) for row, length in lengths)
    shared = (SharedSegment((0, 1, 2), 0, 2048), SharedSegment((0, 2), 2048, 4096))
    counters = Counters()
    counters.count_decode(ForwardPlan(True, requests, shared), config.window, 2)
    assert (counters.decode_queries, counters.dense_queries, counters.shared_queries) == (5, 2, 2)
    counters.count_decode(ForwardPlan(True, requests), config.window, 2)
    counters.count_decode(ForwardPlan(True, requests, shared), config.window, 3)  # of which only two select
    assert counters.shared_queries == 2


def test_a_forward_is_told_what_is_shared_and_the_next_one_is_not():
    """Known before the forward is planned and until the next; nobody tells of the requests of a warm-up."""
    backend, plans = TokenSelectAttnBackend.__new__(TokenSelectAttnBackend), []
    backend.runner = SimpleNamespace(begin=lambda plan, *args, **kwargs: plans.append(plan))
    backend._prefix_groups, backend._recorder = PrefixGroups(2, 0), None
    tree = SimpleNamespace(root_node=Node(0, None, 0))
    reqs = holders(*[Node(1, tree.root_node, 4096)] * 2)
    for req in reqs:
        req.sampling_params = SimpleNamespace(custom_params=None)
    batch = SimpleNamespace(
        forward_mode=SimpleNamespace(is_decode=lambda: True, is_idle=lambda: False),
        req_pool_indices=torch.tensor([5, 6, PADDING_ROW]),
        seq_lens_cpu=torch.tensor([5000, 5001, 1]),
    )
    backend.stage_requests([5, 6], reqs, tree)
    shared = (SharedSegment((0, 1), 0, 4096),)
    assert backend._shared == shared
    backend.init_forward_metadata_out_graph(batch)
    assert backend._shared == shared
    backend.init_forward_metadata_out_graph(batch)
    assert backend._shared == ()
    assert [plan.shared for plan in plans] == [shared, ()]
