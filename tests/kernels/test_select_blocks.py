# SPDX-License-Identifier: Apache-2.0
"""Prefill selection against the float64 reference: Triton's interpreter without a GPU, native with one."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import pytest
import torch
from accelerator import BIG, DEVICE, DTYPES, HAS_CUDA
from paged import UNWRITTEN, poison
from shared_trees import random_segments, share_slots

from sglang_tokenselect.kernels.block_plan import BlockScratch, count_rows_per_block
from sglang_tokenselect.kernels.paged_keys import PagedKeys
from sglang_tokenselect.kernels.reference import prefill
from sglang_tokenselect.kernels.reference.vote import soft_vote
from sglang_tokenselect.kernels.reference.window import Window
from sglang_tokenselect.kernels.select_blocks import PrefillBlock, PrefillPlan, plan_prefill, select_blocks
from sglang_tokenselect.kernels.shared_segment import SharedSegment
from sglang_tokenselect.kernels.workspace import TILE, Workspace, WorkspaceLimits

# The interpreter warns where a column beyond the candidates overflows, where a block has none, and of NaN.
pytestmark = [
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered in log2:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning"),
]
TIE = 1e-3  # relative


class Extend:
    """Extends of several requests in one forward; the pool is NaN wherever there is no candidate's key.

    Args:
        spans: positions [start, end) and budget of each request's extend. Blocks that its window reaches from the
            beginning are dense.
        dense: whether those are items of their own, one for each request; else they are left out and their queries
            remain between those of the others.
        shared: positions that requests have in common, at most what each of them has.
    """

    def __init__(
        self,
        spans: list[tuple[int, int, int]],
        *,
        block: int = 32,
        sub_block: int = 8,
        num_sink: int = 5,
        num_local: int = 12,
        heads: tuple[int, int] = (2, 1),
        head_dim: int = 64,
        dtype: torch.dtype = torch.float16,
        key_dtype: torch.dtype | None = None,
        k_scale: float = 1.0,
        query_scale: float = 0.3,
        dense: bool = False,
        shared: Sequence[SharedSegment] = (),
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.block, self.sub_block, self.num_sink, self.num_local = block, sub_block, num_sink, num_local
        self.num_qo_heads, num_kv_heads = heads
        ends = [end for _, end, _ in spans]
        order = torch.randperm(sum(ends) + 17, generator=generator).to(torch.int32)
        pool = torch.full((sum(ends) + 17, num_kv_heads, head_dim), torch.nan)
        table = torch.full((len(spans) + 2, max(ends) + 9), int(order[-1]), dtype=torch.int32)
        self.rows = torch.randperm(len(table), generator=generator)[: len(spans)].tolist()
        self.blocks: list[PrefillBlock] = []
        for row, end in zip(self.rows, ends, strict=True):
            table[row, :end], order = order[:end], order[end:]
        self.shared = [
            dataclasses.replace(item, rows=tuple(self.rows[index] for index in item.rows)) for item in shared
        ]
        share_slots(table, self.shared)
        num_queries = 3
        for row, (start, end, budget) in zip(self.rows, spans, strict=True):
            sparse = prefill.first_sparse_position(start, end, block, Window(num_sink, budget, num_local))
            if dense and sparse > start:
                self.blocks.append(PrefillBlock(row, start, sparse, num_queries, -1))
            blocks = [
                PrefillBlock(row, lo, hi, num_queries + lo - start, budget)
                for lo, hi in prefill.cut_blocks(sparse, end, block)
            ]
            self.blocks += blocks
            num_queries += end - start
            last = blocks[-1].start if blocks else 0
            candidates = table[row, num_sink : max(last - num_local, num_sink)].long()
            pool[candidates] = torch.randn(len(candidates), num_kv_heads, head_dim, generator=generator)
        self.keys = PagedKeys(pool.to(dtype).to(key_dtype or dtype).to(DEVICE), table.to(DEVICE), k_scale)
        query = torch.randn(num_queries, self.num_qo_heads, head_dim, generator=generator) * query_scale
        self.query = query.to(DEVICE, dtype)

    def limits(self, *, max_rows: int | None = None, max_candidates: int | None = None) -> WorkspaceLimits:
        longest = max(item.end for item in self.blocks)
        return WorkspaceLimits(
            max_rows=max_rows or len(self.blocks),
            max_candidates=max_candidates or sum(item.end for item in self.blocks),
            max_seq_len=longest,
            max_budget=max(1, *(item.budget for item in self.blocks)),
        )

    def plan(self, limits: WorkspaceLimits, *, is_shared: bool = True) -> PrefillPlan:
        return plan_prefill(
            self.blocks,
            limits,
            block=self.block,
            sub_block=self.sub_block,
            num_sink=self.num_sink,
            num_local=self.num_local,
            num_qo_heads=self.num_qo_heads,
            device=DEVICE,
            shared=self.shared if is_shared else (),
        )

    def state(self, limits: WorkspaceLimits) -> dict:
        """What a server holds for all layers, poisoned."""
        num_rows = limits.max_rows * count_rows_per_block(self.block, self.sub_block)
        scratch = BlockScratch.allocate(num_rows, self.num_qo_heads, DEVICE)
        scratch.partial.fill_(torch.nan)
        scratch.lse.fill_(torch.nan)
        means = self.query.new_full((num_rows, *self.query.shape[1:]), torch.nan)
        workspace = Workspace(limits, DEVICE)
        poison(workspace)
        return {"workspace": workspace, "scratch": scratch, "means": means}

    def run(
        self,
        plan: PrefillPlan | None = None,
        state: dict | None = None,
        *,
        vote_scale: float = 1.0,
        combine: str = "max",
    ) -> list[torch.Tensor]:
        """Positions that each block attends to, in the order of their slots; none of a dense one."""
        plan = plan or self.plan(self.limits())
        state = state or self.state(plan.limits)
        indptr = plan.kv_indptr_cpu.tolist()
        kv_indices = torch.full((indptr[-1] + 50,), UNWRITTEN, dtype=torch.int32, device=DEVICE)
        select_blocks(
            self.query,
            self.keys,
            plan,
            **state,
            kv_indices=kv_indices,
            vote_scale=vote_scale,
            combine=combine,
        )
        assert (kv_indices[indptr[-1] :] == UNWRITTEN).all(), "written behind the last row"
        assert (state["workspace"].maxima == -1).all() and (state["workspace"].arrivals == 0).all()
        spans = zip(self.blocks, indptr, indptr[1:], strict=False)
        return [self._positions(item, kv_indices[first:last]) for item, first, last in spans]

    def _positions(self, item: PrefillBlock, slots: torch.Tensor) -> torch.Tensor:
        if item.is_dense:
            assert (slots == UNWRITTEN).all(), f"{item}: written though it is the caller's"
            return slots[:0]
        owned = self.keys.req_to_token[item.req_pool_idx, : item.end].long()
        position = torch.full((self.keys.pool.shape[0],), -1, device=DEVICE)
        position[owned] = torch.arange(item.end, device=DEVICE)
        assert (slots >= 0).all(), f"{item}: not all slots are written"
        return position[slots.long()]

    def check(self, found: list[torch.Tensor], *, vote_scale: float = 1.0, combine: str = "max") -> None:
        """Raises unless the positions are right for every block."""
        assert len(found) == len(self.blocks) > 0
        for item, positions in zip(self.blocks, found, strict=True):
            if item.is_dense:
                continue
            assert (positions.diff() > 0).all(), f"{item}: not strictly ascending"
            sink, chosen, tail = positions.split(
                [self.num_sink, item.budget, self.num_local + item.end - item.start],
            )
            assert sink.tolist() == list(range(self.num_sink))
            assert tail.tolist() == list(range(item.start - self.num_local, item.end))
            if item.budget:
                self._check_chosen(item, chosen, vote_scale, combine)

    def _check_chosen(self, item: PrefillBlock, chosen: torch.Tensor, vote_scale: float, combine: str) -> None:
        """Chosen are those of the reference, up to ties with the least of them."""
        window = Window(self.num_sink, item.budget, self.num_local)
        query = self.query[item.first_query :][: item.end - item.start].double()
        means = prefill.mean_queries(query, item.start, self.sub_block).to(self.query.dtype).double()
        slots = self.keys.req_to_token[item.req_pool_idx, self.num_sink : item.start - self.num_local].long()
        keys = self.keys.pool[slots].double() * self.keys.k_scale
        # Queries that are all their sub-block's rounded mean.
        cuts = prefill.cut_blocks(item.start, item.end, self.sub_block)
        query = torch.cat([mean.expand(hi - lo, -1, -1) for mean, (lo, hi) in zip(means, cuts, strict=True)])
        expected = prefill.select_for_block(
            query, keys, item.start, window, sub_block=self.sub_block, combine=combine, vote_scale=vote_scale
        )
        votes = soft_vote(means, keys, vote_scale=vote_scale)
        score = votes.amax(0) if combine == "max" else votes.sum(0)
        lowest = score[expected[-1] - self.num_sink]
        is_chosen = torch.zeros_like(score, dtype=torch.bool)
        is_chosen[chosen - self.num_sink] = True
        assert score[is_chosen].min() >= lowest * (1 - TIE), f"{item}: chosen though worse than the reference's"
        if not is_chosen.all():
            assert score[~is_chosen].max() <= lowest * (1 + TIE), f"{item}: better ones are left out"


def check(extend: Extend, **options) -> None:
    extend.check(extend.run(**options), **options)


# A radix hit in the middle of a block and of a sub-block, a short last block; one that begins dense; one short block.
MIXED = [(243, 365, 40), (0, 130, 17), (301, 302, 63)]


@pytest.mark.parametrize("combine", ["max", "sum"])
def test_mixed_requests(combine):
    """Each with its own budget, dense queries between those that select."""
    extend = Extend(MIXED)
    assert [(item.start, item.end) for item in extend.blocks[:5]] == [
        (243, 256), (256, 288), (288, 320), (320, 352), (352, 365)
    ]  # fmt: skip
    assert [(item.start, item.end) for item in extend.blocks[5:]] == [(64, 96), (96, 128), (128, 130), (301, 302)]
    check(extend, combine=combine, vote_scale=0.7)


# A request that is dense, one that begins so in the middle of a block, one that votes from its first query on.
WITH_DENSE = [(0, 45, 40), (30, 130, 17), (243, 365, 40), (0, 3, 5)]


@pytest.mark.parametrize(("max_rows", "num_parts"), [(8, 1), (5, 2)])
def test_dense_items(max_rows, num_parts):
    """First, between others and last; longer than a block; they need no rows of the workspace."""
    extend = Extend(WITH_DENSE, dense=True)
    assert [(item.start, item.end) for item in extend.blocks if item.is_dense] == [(0, 45), (30, 64), (0, 3)]
    assert len(extend.blocks) == 8 + 3
    plan = extend.plan(extend.limits(max_rows=max_rows))
    assert len(plan.parts) == num_parts
    extend.check(extend.run(plan))


def test_a_dense_item_between_blocks_of_one_request():
    """It changes nothing for the others."""
    extend, other = Extend(MIXED), Extend(MIXED)
    other.blocks[2] = dataclasses.replace(other.blocks[2], budget=-1)
    expected, found = extend.run(), other.run()
    other.check(found)
    for index in {*range(len(expected))} - {2}:
        assert found[index].tolist() == expected[index].tolist()


def test_a_plan_of_dense_items():
    extend = Extend([(0, 45, 40), (7, 50, 40)], dense=True)
    plan = extend.plan(extend.limits(max_rows=1))
    assert plan.parts == () and plan.num_means == 0
    assert plan.kv_indptr_cpu.tolist() == plan.kv_indptr.tolist() == [0, 45, 95] and plan.num_slots == 95
    assert plan.qo_indptr_cpu.tolist() == [0, 45, 88]
    assert [positions.tolist() for positions in extend.run(plan)] == [[], []]


@pytest.mark.parametrize(("dtype", "key_dtype"), DTYPES)
@pytest.mark.parametrize("heads", [(2, 2), (4, 1), (14, 2)], ids=lambda h: f"{h[0]}q{h[1]}kv")
@pytest.mark.parametrize("head_dim", [64, 128])
def test_heads_and_dtypes(heads, head_dim, dtype, key_dtype):
    """Groups of 1, 4 and 7; keys differ between the heads, so a wrong pairing cannot hide."""
    spans = [(250, 300, 40), (140, 160, 25)]
    check(Extend(spans, heads=heads, head_dim=head_dim, dtype=dtype, key_dtype=key_dtype, k_scale=0.5))


@pytest.mark.parametrize(("num_sink", "num_local"), [(0, 12), (5, 0), (0, 0), (130, 1)])
def test_edges_of_the_window(num_sink, num_local):
    check(Extend([(250, 300, 40), (215, 224, 1)], num_sink=num_sink, num_local=num_local))


@pytest.mark.parametrize("budgets", [(0, 30), (0, 0)], ids=str)
def test_a_budget_of_nothing(budgets):
    """Such a block attends to sink, local window and itself, and needs no scores."""
    check(Extend([(190, 240, budget) for budget in budgets]))


@pytest.mark.parametrize(("block", "sub_block"), [(32, 32), (32, 1), (96, 48), (128, 1)], ids=str)
def test_sub_blocks(block, sub_block):
    """One mean of the block, which is the paper; every query a row; sizes that are no powers of two; 128 rows."""
    check(Extend([(200, 300, 40)], block=block, sub_block=sub_block))


def test_just_above_the_window():
    """One candidate more than are chosen."""
    check(Extend([(40 + 5 + 12 + 1, 64, 40)]))


def test_ties_go_to_the_lower_position():
    extend = Extend([(243, 300, 40)], query_scale=0.0)
    for positions in extend.run():
        assert positions[5:45].tolist() == list(range(5, 45))


def test_peaked_votes():
    """Logits of several hundred: most scores underflow, which makes ties of them."""
    extend = Extend([(243, 300, 40)], query_scale=30.0)
    for item, positions in zip(extend.blocks, extend.run(), strict=True):
        assert len(positions) == 5 + 40 + 12 + item.end - item.start
        assert (positions.diff() > 0).all()


PARTS = [
    pytest.param({"max_rows": 3}, [3, 2, 3, 1], id="rows-cut-a-request"),
    pytest.param({"max_rows": 4}, [3, 2, 4], id="rows-cut-a-request-evenly"),
    # 14 tiles fit, or 16, and the blocks have 2, 2, 3, 3, 3; 1, 1, 1; 3.
    pytest.param({"max_candidates": 5 * TILE}, [5, 4], id="candidates"),
    pytest.param({"max_candidates": 7 * TILE}, [8, 1], id="candidates-to-the-last-tile"),
]


@pytest.mark.parametrize(("limits", "sizes"), PARTS)
def test_parts_select_the_same(limits, sizes):
    """A request stays in one part if that holds it."""
    extend = Extend(MIXED)
    whole, parts = extend.plan(extend.limits()), extend.plan(extend.limits(**limits))
    assert len(whole.parts) == 1
    assert [part.scoring.num_blocks for part in parts.parts] == sizes
    for expected, got in zip(extend.run(whole), extend.run(parts), strict=True):
        assert got.tolist() == expected.tolist()


def test_a_used_workspace_is_as_good_as_a_new_one():
    """Another layer in between, and another forward."""
    extend, other = Extend(MIXED), Extend([(200, 260, 30)], seed=1)
    limits = extend.limits(max_rows=5)
    plan, state = extend.plan(limits), extend.state(limits)
    first = extend.run(plan, state)
    other.check(other.run(other.plan(limits), state))
    again = extend.run(plan, state)
    assert [p.tolist() for p in again] == [p.tolist() for p in first]


def test_a_block_does_not_depend_on_its_neighbours():
    together, alone = Extend(MIXED), Extend(MIXED)
    alone.blocks = alone.blocks[3:4]
    assert alone.run()[0].tolist() == together.run()[3].tolist()


def check_shared(extend: Extend, limits: WorkspaceLimits | None = None, **options) -> PrefillPlan:
    """Selects with and without sharing, both as float64 does, and the same up to a swap of two that almost tie."""
    limits = limits or extend.limits()
    plan, alone = extend.plan(limits), extend.plan(limits, is_shared=False)
    found, expected = extend.run(plan, **options), extend.run(alone, **options)
    extend.check(found, **options)
    for item, together, apart in zip(extend.blocks, found, expected, strict=True):
        assert len({*together.tolist()} ^ {*apart.tolist()}) <= 2, f"{item}: shares other positions than it has alone"
    assert plan.kv_indptr_cpu.tolist() == alone.kv_indptr_cpu.tolist()
    assert plan.qo_indptr_cpu.tolist() == alone.qo_indptr_cpu.tolist()
    return plan


def count_units(plan: PrefillPlan) -> int:
    return sum(part.scoring.votes.num_units for part in plan.parts)


# One that goes on within its first block, two that part later, one with a budget of nothing, a dense one, one alone.
BRANCH_SPANS = [
    (600, 660, 40),
    (611, 650, 17),
    (830, 900, 40),
    (600, 640, 0),
    (30, 45, 40),
    (845, 870, 63),
    (300, 330, 9),
]
BRANCH_TREE = [SharedSegment((0, 1, 2, 3, 5), 0, 600), SharedSegment((2, 5), 600, 830)]


@pytest.mark.parametrize("combine", ["max", "sum"])
@pytest.mark.parametrize("num_local", [12, 130])
def test_requests_that_share_a_prefix(combine, num_local):
    """With a long window, blocks of several positions have all of their candidates in what they share."""
    extend = Extend(BRANCH_SPANS, dense=True, num_local=num_local, shared=BRANCH_TREE)
    plan = check_shared(extend, combine=combine)
    assert count_units(plan) < count_units(extend.plan(plan.limits, is_shared=False))


@pytest.mark.parametrize(
    ("sizes", "num_parts"), [({"max_rows": 4}, 5), ({"max_rows": 7}, 3), ({"max_candidates": 2900}, 3)], ids=str
)
def test_parts_of_requests_that_share_a_prefix(sizes, num_parts):
    extend = Extend(BRANCH_SPANS, shared=BRANCH_TREE)
    plan = check_shared(extend, extend.limits(**sizes))
    assert len(plan.parts) == num_parts


def test_each_part_shares_what_its_own_requests_do():
    """Two groups that share prefixes of unlike lengths."""
    shared = [SharedSegment((0, 1), 0, 600), SharedSegment((2, 3), 0, 300)]
    extend = Extend([(600, 640, 20)] * 4, shared=shared)
    plan = check_shared(extend, extend.limits(max_rows=4))
    assert [part.scoring.num_blocks for part in plan.parts] == [4, 4]
    assert [part.scoring.votes.num_units for part in plan.parts] == [4 + 2, 2 + 2 * 3]


@pytest.mark.parametrize(
    "shared",
    [[SharedSegment((0, 3), 0, 600)], [SharedSegment((3, 4), 0, 45), SharedSegment((0, 5), 0, 250)]],
    ids=["all but one select nothing", "too little"],
)
def test_nobody_to_share_with(shared):
    """Then the work is that of requests which share nothing."""
    spans = [(600, 720, 40), (611, 650, 17), (830, 900, 40), (600, 640, 0), (30, 45, 40), (845, 870, 63)]
    extend = Extend(spans, dense=True, shared=shared)
    (part,), (alone,) = (extend.plan(extend.limits(), is_shared=is_shared).parts for is_shared in (True, False))
    assert sorted(part.kv_start.tolist()) == sorted(alone.kv_start.tolist())
    for tiling, other in ((part.scoring.votes, alone.scoring.votes), (part.scoring.logsumexp, alone.scoring.logsumexp)):
        assert (tiling.num_units, tiling.tuning) == (other.num_units, other.tuning)
    extend.check(extend.run())


def test_ties_in_what_requests_share_go_to_the_lower_position():
    extend = Extend(BRANCH_SPANS, query_scale=0.0, shared=BRANCH_TREE)
    for item, positions in zip(extend.blocks, extend.run(), strict=True):
        assert positions[5 : 5 + item.budget].tolist() == list(range(5, 5 + item.budget))


@pytest.mark.parametrize("seed", range(8))
def test_random_trees(seed):
    """Requests with dense parts, radix hits anywhere, budgets of nothing; shared are parts of what each has cached."""
    choose = random.Random(seed)
    spans = []
    for _ in range(choose.randint(3, 7)):
        start = choose.choice([choose.randint(1, 900), choose.randint(500, 560)])
        spans.append((start, start + choose.randint(1, 70), choose.choice([0, 1, 17, 40])))
    # A block or two at least that select.
    spans.append((700, 740, 20))
    shared = random_segments(choose, [start for start, _, _ in spans])
    extend = Extend(
        spans,
        dense=choose.random() < 0.7,
        heads=choose.choice([(2, 1), (2, 2), (3, 1)]),
        num_sink=choose.choice([5, 0, 64]),
        num_local=choose.choice([12, 0, 100]),
        shared=shared,
        seed=seed,
    )
    num_rows = sum(not item.is_dense for item in extend.blocks)
    check_shared(extend, extend.limits(max_rows=choose.choice([num_rows, -(-num_rows // 2)])))


def test_a_used_workspace_serves_requests_that_share():
    """Twice with one workspace, with another forward in between."""
    extend, other = Extend(BRANCH_SPANS, shared=BRANCH_TREE), Extend(BRANCH_SPANS[:3], seed=1)
    limits = extend.limits()
    plan, state = extend.plan(limits), extend.state(limits)
    first = extend.run(plan, state)
    other.check(other.run(other.plan(limits), state))
    assert [p.tolist() for p in extend.run(plan, state)] == [p.tolist() for p in first]


def test_nan_in_a_query_keeps_the_lengths():
    """A broken request gets some selection of the right length; the others get theirs."""
    extend = Extend(MIXED)
    broken = extend.blocks[1]
    extend.query[broken.first_query + 3, 1] = torch.nan
    found = extend.run()
    positions = found.pop(1)
    assert (positions.diff() > 0).all() and (positions >= 0).all()
    extend.blocks.remove(broken)
    extend.check(found)


def test_plan():
    """Row lengths, and the same pointers on both sides."""
    extend = Extend(MIXED, dense=True)
    plan = extend.plan(extend.limits(max_rows=5))
    sparse = [index for index, item in enumerate(extend.blocks) if not item.is_dense]
    blocks = [extend.blocks[index] for index in sparse]
    assert len(blocks) == len(extend.blocks) - 1
    lengths = [item.end if item.is_dense else 5 + item.budget + 12 + item.end - item.start for item in extend.blocks]
    assert plan.kv_indptr_cpu.diff().tolist() == lengths and plan.kv_indptr_cpu[0] == 0
    assert plan.num_slots == sum(lengths)
    assert plan.qo_indptr_cpu.diff().tolist() == [item.end - item.start for item in extend.blocks]
    assert plan.qo_indptr_cpu[0] == 0 and plan.qo_indptr_cpu.dtype == torch.int32
    assert plan.qo_indptr_cpu.device.type == "cpu"
    assert plan.kv_indptr_cpu.device.type == "cpu" and plan.kv_indptr_cpu.dtype == torch.int32
    assert torch.equal(plan.kv_indptr.cpu(), plan.kv_indptr_cpu)
    assert torch.equal(torch.cat([part.kv_start for part in plan.parts]), plan.kv_indptr[sparse])
    rows = [part.rows for part in plan.parts]
    assert torch.cat([r.num_chosen for r in rows]).tolist() == [item.budget for item in blocks]
    assert torch.cat([r.kv_end for r in rows]).tolist() == [item.end for item in blocks]
    assert plan.kv_indptr.untyped_storage().data_ptr() == rows[1].kv_end.untyped_storage().data_ptr(), "one copy"


def test_a_plan_of_nothing():
    """No blocks."""
    extend = Extend([(100, 200, 20)])
    limits, extend.blocks = extend.limits(), []
    assert extend.run(extend.plan(limits)) == []


ITEM = PrefillBlock(req_pool_idx=1, start=70, end=96, first_query=0, budget=40)


@pytest.mark.parametrize(
    ("item", "sizes", "message"),
    [
        ({"start": 57}, {}, r"blocks\[1\].start: expected more than 57, the window, got 57"),
        ({"budget": 41}, {}, r"blocks\[1\].budget: expected -1 to 40, got 41"),
        ({"budget": -2}, {}, r"blocks\[1\].budget: expected -1 to 40, got -2"),
        ({"budget": -1, "start": -1}, {}, r"blocks\[1\]: expected 0 <= start < end, got -1 and 96"),
        ({"budget": -1, "end": 70}, {}, r"blocks\[1\]: expected 0 <= start < end, got 70 and 70"),
        ({"end": 70}, {}, r"blocks\[1\].end: expected 71 to 96, got 70"),
        ({"end": 97}, {}, r"blocks\[1\].end: expected 71 to 96, got 97"),
        ({"start": 97, "end": 101}, {}, r"blocks\[1\].end: expected 98 to 100, got 101"),
        ({}, {"sub_block": 5}, "sub_block: expected a divisor of block=32, got 5"),
        ({}, {"block": 48, "sub_block": 16}, "block // sub_block: expected a power of two up to 128, got 3"),
        ({}, {"block": 256, "sub_block": 1}, "block // sub_block: expected a power of two up to 128, got 256"),
    ],
)
def test_plan_refusals(item, sizes, message):
    limits = WorkspaceLimits(max_rows=2, max_candidates=100, max_seq_len=100, max_budget=40)
    sizes = {"block": 32, "sub_block": 8, "num_sink": 5, "num_local": 12, "num_qo_heads": 2, "device": DEVICE} | sizes
    with pytest.raises(ValueError, match=message):
        plan_prefill([ITEM, dataclasses.replace(ITEM, **item)], limits, **sizes)


def int32(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.int32, device=DEVICE)


def half(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workspace": Workspace(WorkspaceLimits(1, 365, 365, 40), DEVICE)}, "workspace.limits: expected .*max_rows=5"),
        ({"kv_indices": int32(406)}, "kv_indices: expected 407 slots or more, got 406"),
        ({"kv_indices": int32(900).long()}, "kv_indices: expected dtype torch.int32, got torch.int64"),
        ({"means": half(19, 2, 64)}, "means: expected 20 rows or more, got 19"),
        ({"means": half(20, 3, 64)}, r"out: expected shape \[20, 2, 64\], got \[20, 3, 64\]"),
        ({"means": half(20, 2, 64, dtype=torch.bfloat16)}, "means: expected dtype torch.float16, got torch.bfloat16"),
        ({"query": half(130, 2, 64).float()}, "query: expected dtype torch.bfloat16 or torch.float16"),
        ({"vote_scale": -1.0}, "vote_scale: expected more than 0, got -1.0"),
        ({"combine": "mean"}, "combine: expected 'max' or 'sum', got 'mean'"),
    ],
)
def test_refusals(changes, message):
    extend = Extend(MIXED[:1])
    plan = extend.plan(extend.limits())
    arguments = {
        "query": extend.query,
        "keys": extend.keys,
        "plan": plan,
        **extend.state(plan.limits),
        "kv_indices": int32(500),
        "vote_scale": 1.0,
        "combine": "max",
    }
    with pytest.raises(ValueError, match=message):
        select_blocks(**(arguments | changes))


@BIG
@pytest.mark.parametrize(("dtype", "key_dtype"), DTYPES)
@pytest.mark.parametrize("combine", ["max", "sum"])
def test_long_context(dtype, key_dtype, combine):
    """A chunk after 131,072 tokens beside shorter requests, at the sizes of a server, in one part and in several."""
    spans = [(131_072 - 50, 131_072 + 2048, 2048), (9_000, 9_901, 500), (20_000, 22_001, 8192)]
    sizes = {"block": 128, "sub_block": 16, "num_sink": 128, "num_local": 512, "heads": (28, 4), "head_dim": 128}
    extend = Extend(spans, dtype=dtype, key_dtype=key_dtype, **sizes)
    found = extend.run(combine=combine)
    extend.check(found, combine=combine)
    parts = extend.plan(extend.limits(max_candidates=1_000_000))
    assert len(parts.parts) > 2
    extend.check(extend.run(parts, combine=combine), combine=combine)


@BIG
@pytest.mark.parametrize(("dtype", "key_dtype"), DTYPES)
def test_many_branches(dtype, key_dtype):
    """32 requests over 32,768 shared tokens, in one part and in several."""
    spans = [(32_768 + 40 * (i % 3), 33_024 + 90 * i, 2048) for i in range(32)]
    shared = [SharedSegment(tuple(range(32)), 0, 32_768), SharedSegment(tuple(range(1, 32, 3)), 32_768, 32_808)]
    sizes = {"block": 128, "sub_block": 16, "num_sink": 128, "num_local": 512, "heads": (28, 4), "head_dim": 128}
    extend = Extend(spans, dtype=dtype, key_dtype=key_dtype, shared=shared, **sizes)
    extend.check(extend.run())
    parts = extend.plan(extend.limits(max_rows=128))
    assert len(parts.parts) > 2
    extend.check(extend.run(parts))


@pytest.mark.skipif(not HAS_CUDA, reason="a stream and an allocator of its own")
def test_no_sync_and_no_allocation():
    extend = Extend(MIXED, dtype=torch.bfloat16)
    plan = extend.plan(extend.limits())
    state = extend.state(plan.limits)
    kv_indices = int32(int(plan.kv_indptr_cpu[-1]))
    arguments = {"vote_scale": 1.0, "combine": "max", "kv_indices": kv_indices, **state}
    select_blocks(extend.query, extend.keys, plan, **arguments)
    allocations = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        extend.plan(plan.limits)
        allocations_of_plan = torch.cuda.memory_stats()["allocation.all.allocated"] - allocations
        select_blocks(extend.query, extend.keys, plan, **arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocations + allocations_of_plan
    assert allocations_of_plan == 1
