# SPDX-License-Identifier: Apache-2.0
"""The selection cache on the device against `reference/cache.py`, and CUDA graphs over all of decode."""

from __future__ import annotations

import random

import pytest
import torch
from accelerator import DEVICE
from paged import DecodeStep, PagedBatch, poison, poison_entries

from sglang_tokenselect.kernels.reference.cache import CachedSelection
from sglang_tokenselect.kernels.reference.window import Window
from sglang_tokenselect.kernels.selection_cache import SelectionCache, SelectionCaches
from sglang_tokenselect.kernels.workspace import nbytes

NEEDS_CUDA = pytest.mark.skipif(DEVICE != "cuda", reason="CUDA graphs need a GPU")
WINDOW = Window(num_sink=5, budget=40, num_local=12)


def growing(seq_lens: list[int], steps: int, **options) -> DecodeStep:
    """Requests that may grow by ``steps`` tokens."""
    paged = PagedBatch([n + steps for n in seq_lens])
    step = DecodeStep(paged, WINDOW, **options)
    step.batch.seq_lens.sub_(steps)
    return step


def kept(step: DecodeStep, slot: int, count: int) -> list[int]:
    """Positions of the best ``count`` members of an entry, ascending."""
    keys = step.cache.vote[slot, : int(step.cache.vote_len[slot])].sort(descending=True).values[:count]
    return sorted((WINDOW.num_sink + 0x7FFFFFFF - (keys & 0x7FFFFFFF)).tolist())


def test_a_vote_is_reused_and_gives_up_its_least_members():
    step = growing([300, 411], steps=9)
    for row, positions in enumerate(step.run()):
        step.check(row, positions)
    for age in range(1, 10):
        step.batch.seq_lens.add_(1)
        for row, positions in enumerate(step.run()):
            step.check(row, positions, age=age)
            assert positions[5 : 45 - age] == kept(step, row, 40 - age)
    assert step.cache.counters.tolist() == [18, 2]


def test_a_row_that_reuses_reads_no_keys():
    step = growing([300, 411], steps=1)
    step.run()
    poison(step.workspace)
    before = {name: t.clone() for name, t in vars(step.workspace).items() if isinstance(t, torch.Tensor)}
    step.batch.seq_lens.add_(1)
    step.run()
    assert step.cache.counters.tolist() == [2, 2]
    for name in ("terms", "scores", "segments"):
        assert torch.equal(before[name].nan_to_num(1), getattr(step.workspace, name).nan_to_num(1)), name


def test_positions_are_kept_not_slots():
    """The radix cache moves a running request to other slots."""
    step = growing([300], steps=1)
    first = step.run()[0]
    paged, length = step.paged, 301
    moved = paged.slots[0, :length].flip(0)
    pool = paged.keys.pool
    pool[moved.long()] = pool[paged.slots[0, :length].long()].clone()
    paged.slots[0, :length] = moved
    paged.table[paged.req_pool_indices[0], :length] = moved
    step.batch.seq_lens.add_(1)
    assert step.run()[0][:44] == first[:5] + kept(step, 0, 39)
    assert step.cache.counters.tolist() == [1, 1]


@pytest.mark.parametrize(("similarity", "reuses"), [(0.93, 1), (0.87, 0), (-1.0, 0)])
def test_theta_is_a_cosine_over_all_heads(similarity, reuses):
    step = growing([300], steps=1)
    step.run()
    query = step.paged.query.float().flatten()
    other = torch.randn(query.shape, generator=torch.Generator(DEVICE).manual_seed(1), device=DEVICE)
    other -= other.dot(query) / query.dot(query) * query
    mixed = similarity * query / query.norm() + (1 - similarity**2) ** 0.5 * other / other.norm()
    step.paged.query.copy_((mixed * 20).view_as(step.paged.query))
    step.batch.seq_lens.add_(1)
    positions = step.run()[0]
    assert step.cache.counters.tolist() == [reuses, 2 - reuses]
    assert positions[5:-12] == (kept(step, 0, 39) + [288] if reuses else kept(step, 0, 40))


@pytest.mark.parametrize("theta", [-1.0, 1.5])
def test_ends_of_theta(theta):
    """-1: any query will do. Above 1: none will."""
    step = growing([300], steps=1, theta=theta)
    step.run()
    step.paged.query.neg_()
    step.batch.seq_lens.add_(1)
    step.run()
    assert step.cache.counters.tolist() == ([1, 1] if theta < 0 else [0, 2])


def test_a_vote_serves_max_reuse_steps():
    step = growing([300], steps=7, max_reuse=3)
    for age in (0, 1, 2, 0, 1, 2, 0):
        step.check(0, step.run()[0], age=age)
        step.batch.seq_lens.add_(1)


def test_a_smaller_budget_is_a_cut_and_a_larger_one_a_vote():
    step = growing([300], steps=5, max_budget=64)
    step.run()
    # At age 3 a budget of 3 leaves the vote no member; at age 4, one of 2 is no longer enough.
    for budget, votes in ((17, 1), (30, 1), (3, 1), (2, 2), (64, 3)):
        step.batch.budgets.fill_(budget)
        step.batch.seq_lens.add_(1)
        positions = step.run()[0]
        age = int(step.batch.seq_lens[0] - step.cache.seq_len[0])
        assert positions[5 : 5 + budget - age] == kept(step, 0, budget - age)
        assert len(positions) == 5 + budget + 12
        assert step.cache.counters[1] == votes


def test_an_entry_that_ended_is_not_read():
    """Whoever had the slot before: NaN queries, votes out of range, a length from the future."""
    step = growing([300, 300, 300], steps=1)
    step.run()
    step.batch.seq_lens.add_(1)
    step.cache.seq_len.copy_(torch.tensor([0, 302, 10**6]))
    step.cache.vote.fill_(2**62)
    step.cache.query[0].fill_(torch.nan)
    for row, positions in enumerate(step.run()):
        step.check(row, positions)
    assert step.cache.counters.tolist() == [0, 6]
    assert step.cache.seq_len.tolist() == [301] * 3


def test_a_row_without_a_slot_votes_and_leaves_nothing():
    step = growing([300, 411, 30], steps=2, cache_slots=[-1, 1, -1])
    for age in range(3):
        for row, positions in enumerate(step.run()):
            step.check(row, positions, age=age if row == 1 else 0)
        step.batch.seq_lens.add_(1)
    assert step.cache.counters.tolist() == [2, 4]
    assert step.cache.seq_len[0] == 0 and (step.cache.vote[0] == 2**62).all()


def test_a_request_within_its_window_leaves_its_entry_alone():
    step = growing([57, 58], steps=0)
    step.run()
    assert step.cache.seq_len.tolist() == [0, 58]


def test_hits_need_no_part_of_their_own():
    """Rows that reuse a vote, that fit their window and that vote, in the parts that all votes would need."""
    step = growing([500, 57, 320, 444, 380, 30], steps=1, max_candidates=500, theta=-1.0)
    for ages in ([0] * 6, [1, 0, 1, 0, 1, 0]):
        for row, positions in enumerate(step.run()):
            step.check(row, positions, age=ages[row])
        assert len(step.parts) == 2
        step.batch.seq_lens.add_(1)
        step.cache.seq_len[3] = 0
    assert step.cache.counters.tolist() == [3, 6]


def caches_like(step: DecodeStep, num_layers: int, num_slots: int) -> SelectionCaches:
    """Caches for the step's queries, their entries poisoned."""
    cache = step.cache
    sizes = (cache.query.shape[1], cache.vote.shape[1])
    caches = SelectionCaches.create(num_layers, num_slots, *sizes, cache.query.dtype, DEVICE)
    for index in range(num_layers):
        poison_entries(caches.layer(index))
    return caches


@pytest.mark.parametrize("layer", range(3))
def test_layers_have_entries_of_their_own(layer):
    """An odd number of slots: no layer's entries are aligned as another's."""
    step = growing([300, 411, 58], steps=2)
    caches = caches_like(step, num_layers=3, num_slots=3)
    step.cache = caches.layer(layer)
    for age in range(3):
        for row, positions in enumerate(step.run()):
            step.check(row, positions, age=age)
        step.batch.seq_lens.add_(1)
    others = [index for index in range(3) if index != layer]
    assert caches.seq_len[layer].tolist() == [300, 411, 58] and not caches.seq_len[others].any()
    assert caches.counters[layer].tolist() == [6, 3] and not caches.counters[others].any()
    for index in others:
        assert (caches.layer(index).vote == 2**62).all() and caches.layer(index).query.isnan().all()


def test_forget():
    """These slots of every layer, and no others; a batch in which nobody ended has none."""
    caches = SelectionCaches.create(2, 5, 64, 40, torch.float16, DEVICE)
    caches.seq_len.fill_(9)
    for slots in ([], [3, 0]):
        caches.forget(torch.tensor(slots, dtype=torch.int64, device=DEVICE))
    assert caches.seq_len.tolist() == [[0, 9, 9, 0, 9]] * 2
    assert caches.layer(1).seq_len.tolist() == [0, 9, 9, 0, 9]
    assert caches.layer(1) is caches.layer(1)


def test_no_slots():
    """Memory for no entry: every row votes in every step."""
    step = growing([300, 411], steps=1, cache_slots=[-1, -1])
    caches = caches_like(step, num_layers=2, num_slots=0)
    step.cache = caches.layer(1)
    for _ in range(2):
        for row, positions in enumerate(step.run()):
            step.check(row, positions)
        step.batch.seq_lens.add_(1)
    caches.forget(torch.empty(0, dtype=torch.int64, device=DEVICE))
    assert caches.counters.tolist() == [[0, 0], [0, 4]]


@pytest.mark.parametrize("num_slots", [0, 1, 7])
def test_bytes_are_known_beforehand(num_slots):
    sizes = (3, num_slots, 256, 40, torch.bfloat16)
    caches = SelectionCaches.create(*sizes, DEVICE)
    layers = [tensor for index in range(3) for tensor in vars(caches.layer(index)).values()]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in layers}
    assert nbytes(SelectionCaches.create(*sizes, "meta")) == nbytes(caches) == sum(storages.values())
    assert len(storages) == (len(vars(caches.layer(0))) if num_slots else 2)
    assert nbytes(caches) == 3 * (num_slots * (256 * 2 + 8 * 40 + 16) + 16)


def test_one_layer_is_as_one_of_many():
    """What `SelectionCache.create` makes and a layer of `SelectionCaches` differ in nothing but where they lie."""
    alone = SelectionCache.create(5, 64, 40, torch.float16, DEVICE)
    layer = SelectionCaches.create(2, 5, 64, 40, torch.float16, DEVICE).layer(1)
    for name, tensor in vars(alone).items():
        other = getattr(layer, name)
        assert (tensor.shape, tensor.dtype, tensor.stride()) == (other.shape, other.dtype, other.stride()), name


def walk(step: DecodeStep, launch, *, steps: int, seed: int) -> None:
    """Queries that drift or jump, budgets and entries that come and go; each step against the reference."""
    chance = random.Random(seed)
    entries: dict[int, CachedSelection] = {}
    seen = {"reused": 0, "voted": 0}
    for _ in range(steps):
        step.batch.seq_lens.add_(1)
        noise = chance.choice([0.05, 0.3, 1.0])
        drift = torch.randn(step.paged.query.shape, generator=torch.Generator().manual_seed(chance.randrange(2**31)))
        step.paged.query.add_(noise * drift.to(step.paged.query))
        step.batch.budgets.copy_(torch.tensor([chance.choice([9, 30, 40]) for _ in range(len(step.paged))]))
        for slot in range(len(step.paged)):
            if chance.random() < 0.1:
                step.cache.seq_len[slot] = 0
                entries.pop(slot, None)
        votes_before = step.cache.counters.tolist()
        step.plan()
        launch()
        for row, positions in enumerate(step.positions()):
            seq_len, window = int(step.batch.seq_lens[row]), step.windows()[row]
            if seq_len <= window.size:
                step.check(row, positions)
                continue
            entry = entries.get(row)
            reused = entry is not None and entry.serves(
                step.paged.query[row],
                seq_len,
                window,
                theta=float(step.batch.theta),
                max_reuse=int(step.batch.max_reuse),
            )
            if reused:
                count = window.budget - (seq_len - entry.seq_len)
                assert positions[5 : 5 + count] == kept(step, row, count)
                assert positions[5 + count :] == list(range(entry.seq_len - 12, seq_len))
            else:
                step.check(row, positions)
                ranked = torch.tensor(kept(step, row, window.budget))
                entries[row] = CachedSelection(step.paged.query[row].clone(), ranked, seq_len)
            seen["reused" if reused else "voted"] += 1
        hits, votes = (a - b for a, b in zip(step.cache.counters.tolist(), votes_before, strict=True))
        assert hits + votes == sum(
            n > w.size for n, w in zip(step.batch.seq_lens.tolist(), step.windows(), strict=True)
        )
    assert [seen["reused"], seen["voted"]] == step.cache.counters.tolist()
    assert min(seen.values()) > steps // 4


@pytest.mark.parametrize("seed", range(3))
def test_a_long_walk(seed):
    step = growing([300, 40, 411], steps=24, max_reuse=7)
    walk(step, step.launch, steps=24, seed=seed)


@NEEDS_CUDA
def test_graph_replays_with_other_lengths_budgets_and_hits():
    step = growing([300, 40, 411, 58, 700], steps=60, max_reuse=7)
    step.run()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.launch()
    step.cache.seq_len.zero_()
    step.cache.counters.zero_()
    walk(step, graph.replay, steps=60, seed=5)
