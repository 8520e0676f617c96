# SPDX-License-Identifier: Apache-2.0
"""Scores of prefill blocks against the float64 reference: Triton's interpreter without a GPU, native with one."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence

import pytest
import torch
from accelerator import BIG, DEVICE, DTYPES, NEEDS_CUDA
from shared_trees import random_segments, share_slots

from sglang_tokenselect.kernels.block_means import mean_queries
from sglang_tokenselect.kernels.block_plan import (
    DEFAULT_TUNING,
    KEY_QUANTUM,
    MAX_LEVELS,
    SPLITS,
    BlockPlan,
    BlockScratch,
    PassTuning,
    Tuning,
    count_rows_per_block,
    cut_runs,
    plan_blocks,
)
from sglang_tokenselect.kernels.block_sharing import order_blocks
from sglang_tokenselect.kernels.block_votes import BlockRanks, score_blocks
from sglang_tokenselect.kernels.paged_keys import PagedKeys
from sglang_tokenselect.kernels.reference import prefill
from sglang_tokenselect.kernels.reference.vote import soft_vote
from sglang_tokenselect.kernels.shared_segment import SharedSegment
from sglang_tokenselect.kernels.transfer import to_device
from sglang_tokenselect.kernels.workspace import TILE

NUM_SINK = 5
# The interpreter warns where a row has no candidates and where a column beyond the candidates overflows.
pytestmark = [
    pytest.mark.filterwarnings("ignore:divide by zero encountered in log2:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning"),
]
SMALL = Tuning(logsumexp=PassTuning(32, 64, 4, 2), votes=PassTuning(16, 32, 4, 2))


class Case:
    """Blocks of several requests, whose slots are scattered in a pool that is NaN everywhere else.

    Args:
        blocks: (request, candidates, rows that vote) of each block, blocks of a request together.
        shared: positions that requests have in common; the blocks are then in the order in which they share.
    """

    def __init__(
        self,
        blocks: list[tuple[int, int, int]],
        *,
        rows_per_block: int = 2,
        heads: tuple[int, int] = (4, 2),
        head_dim: int = 64,
        dtype: torch.dtype = torch.float16,
        key_dtype: torch.dtype | None = None,
        query_scale: float = 0.3,
        k_scale: float = 1.0,
        shared: Sequence[SharedSegment] = (),
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        requests, counts, _ = zip(*blocks, strict=True)
        order, self.num_common = order_blocks(requests, counts, shared, num_sink=NUM_SINK)
        self.blocks, self.rows_per_block = [blocks[b] for b in order], rows_per_block
        self.num_qo_heads, num_kv_heads = heads
        num_requests = 1 + max(request for request, _, _ in blocks)
        lengths = [max([0, *(n for r, n, _ in blocks if r == request)]) for request in range(num_requests)]
        for segment in shared:
            for request in segment.rows:
                lengths[request] = max(lengths[request], segment.end - NUM_SINK)
        num_slots = 2 * sum(lengths) + NUM_SINK * num_requests + 3
        order = torch.randperm(num_slots, generator=generator).to(torch.int32)
        # Positions without a key of their own point at a slot of NaN.
        req_to_token = torch.full((num_requests, NUM_SINK + max(lengths) + 9), int(order[-1]), dtype=torch.int32)
        keys = torch.full((num_slots, num_kv_heads, head_dim), torch.nan, dtype=dtype)
        for request, length in enumerate(lengths):
            slots, order = order[:length], order[length:]
            req_to_token[request, NUM_SINK : NUM_SINK + length] = slots
        share_slots(req_to_token, shared)
        for request, length in enumerate(lengths):
            slots = req_to_token[request, NUM_SINK : NUM_SINK + length]
            keys[slots.long()] = torch.randn(length, num_kv_heads, head_dim, generator=generator).to(dtype)
        keys = keys.to(key_dtype or dtype)
        means = torch.randn(len(blocks) * rows_per_block, self.num_qo_heads, head_dim, generator=generator)
        means = (means * query_scale).to(dtype)
        for block, (_, _, num_rows) in enumerate(self.blocks):
            means[block * rows_per_block + num_rows : (block + 1) * rows_per_block] = torch.nan
        self.means = means.to(DEVICE)
        self.keys = PagedKeys(keys.to(DEVICE), req_to_token.to(DEVICE), k_scale)

    def plan(
        self, *, num_multiprocessors: int = 4, tuning: Tuning = DEFAULT_TUNING, is_shared: bool = True
    ) -> BlockPlan:
        requests, counts, rows = (list(column) for column in zip(*self.blocks, strict=True))
        plan = plan_blocks(
            requests,
            counts,
            rows,
            rows_per_block=self.rows_per_block,
            num_qo_heads=self.num_qo_heads,
            num_multiprocessors=num_multiprocessors,
            num_common=self.num_common if is_shared else (),
            tuning=tuning,
        )
        return to_device(plan, DEVICE)

    def reference(self, block: int, *, vote_scale: float, combine: str) -> torch.Tensor:
        request, count, num_rows = self.blocks[block]
        slots = self.keys.req_to_token[request, NUM_SINK : NUM_SINK + count].long()
        rows = self.means[block * self.rows_per_block :][:num_rows].double()
        votes = soft_vote(rows, self.keys.pool[slots].double() * self.keys.k_scale, vote_scale=vote_scale)
        return votes.amax(0) if combine == "max" else votes.sum(0)

    def of_rank(self, rank: int, world_size: int) -> Case:
        """The same blocks with the heads of one rank of a tensor parallel group."""
        mine = copy.copy(self)
        mine.num_qo_heads = self.num_qo_heads // world_size
        mine.means = self.means.chunk(world_size, dim=1)[rank].contiguous()
        pool = self.keys.pool.chunk(world_size, dim=1)[rank].contiguous()
        mine.keys = PagedKeys(pool, self.keys.req_to_token, self.keys.k_scale)
        return mine

    def run(
        self, plan: BlockPlan, *, vote_scale: float = 1.0, combine: str = "max", ranks: BlockRanks | None = None
    ) -> torch.Tensor:
        """Scores of all blocks, from poisoned memory; one tile more than the plan asks for."""
        scratch = BlockScratch.allocate(self.means.shape[0] + 3, self.num_qo_heads, DEVICE)
        scratch.partial.fill_(torch.nan)
        scratch.lse.fill_(torch.nan)
        scores = torch.full((plan.num_tiles + 1, TILE), torch.nan, device=DEVICE)
        score_blocks(
            self.means,
            self.keys,
            plan,
            scratch,
            scores,
            num_sink=NUM_SINK,
            vote_scale=vote_scale,
            combine=combine,
            ranks=ranks,
        )
        return scores.flatten()

    def check(self, *, vote_scale: float = 1.0, combine: str = "max", **options) -> BlockPlan:
        plan = self.plan(**options)
        self.check_scores(plan, self.run(plan, vote_scale=vote_scale, combine=combine), vote_scale, combine)
        return plan

    def check_scores(self, plan: BlockPlan, scores: torch.Tensor, vote_scale: float, combine: str) -> None:
        written = torch.zeros_like(scores, dtype=torch.bool)
        for block, (start, (_, count, _)) in enumerate(zip(plan.tile_indptr.tolist(), self.blocks, strict=False)):
            assert_scores(scores[start * TILE :][:count], self.reference(block, vote_scale=vote_scale, combine=combine))
            written[start * TILE : start * TILE + count] = True
        assert scores[~written].isnan().all(), "written outside of the candidates"


def assert_scores(got: torch.Tensor, expected: torch.Tensor, *, rtol: float = 1e-3, atol: float = 1e-12) -> None:
    error = (got.double() - expected).abs()
    worst = (error / (expected + atol)).max().item() if got.numel() else 0.0
    print(f"worst relative error {worst:.1e} of {got.numel()} scores")
    assert (error <= rtol * expected + atol).all(), f"worst relative error {worst:.3e}"  # fails on NaN


@pytest.mark.parametrize("count", [1, 63, 100, 127, 128, 129, 2000])
@pytest.mark.parametrize("combine", ["max", "sum"])
def test_one_block(count, combine):
    Case([(0, count, 2)], seed=count).check(combine=combine)


@pytest.mark.parametrize(("dtype", "key_dtype"), DTYPES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("heads", [(2, 2), (4, 1), (14, 2), (7, 1)], ids=lambda h: f"{h[0]}/{h[1]}")
def test_heads(heads, head_dim, dtype, key_dtype):
    """Groups of 1, 4 and 7; keys differ between the heads, so a wrong pairing cannot hide."""
    case = Case([(0, 100, 2), (0, 163, 1)], heads=heads, head_dim=head_dim, dtype=dtype, key_dtype=key_dtype)
    case.check(vote_scale=0.7)


@pytest.mark.parametrize("rows_per_block", [1, 2, 8])
@pytest.mark.parametrize("combine", ["max", "sum"])
@pytest.mark.parametrize("tuning", [DEFAULT_TUNING, SMALL], ids=["default", "small tiles"])
def test_blocks_of_several_requests(rows_per_block, combine, tuning):
    """Row tiles with one and with many blocks, requests of unlike lengths, blocks with fewer rows than others."""
    some = max(1, rows_per_block - 1)
    blocks = [
        *((2, 300 + 16 * i, rows_per_block) for i in range(9)),
        (0, 1, some),
        (3, 129, 1),
        (3, 145, rows_per_block),
        (1, 800, some),
    ]
    case = Case(blocks, rows_per_block=rows_per_block, heads=(2, 1), seed=rows_per_block)
    plan = case.check(combine=combine, tuning=tuning)
    assert plan.logsumexp.runs.shape[0] == 5
    if tuning is SMALL and rows_per_block == 8:
        assert plan.logsumexp.row_tiles[:, 1].tolist() == [4, 4, 1, 1, 2, 1]


@pytest.mark.parametrize("rows_per_block", [64, 128])
def test_a_block_fills_a_row_tile(rows_per_block):
    blocks = [(0, 130, rows_per_block), (0, 140, rows_per_block - 5), (0, 150, 3)]
    Case(blocks, rows_per_block=rows_per_block, heads=(2, 1)).check()


@pytest.mark.parametrize(("num_multiprocessors", "split_tokens"), [(1, 1024), (6, 512), (200, 256)])
def test_key_splits(num_multiprocessors, split_tokens):
    """Several splits, and more than the shorter blocks have keys for; short requests elsewhere here have one."""
    case = Case([(0, 300, 2), (0, 2000, 2), (1, 257, 2)], heads=(2, 1))
    assert case.check(num_multiprocessors=num_multiprocessors).split_tokens == split_tokens


@pytest.mark.parametrize("rows_per_block", [1, 2, 8])
@pytest.mark.parametrize("combine", ["max", "sum"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_that_add_up_their_votes(rows_per_block, combine, world_size):
    """The best sub-block is the best for all heads, which no rank sees alone."""
    blocks = [*((1, 300 + 16 * i, rows_per_block) for i in range(5)), (0, 1, 1), (2, 129, 1), (2, 0, 1)]
    case = Case(blocks, rows_per_block=rows_per_block, heads=(2 * world_size, world_size))
    told: list[torch.Tensor] = []
    for rank in range(world_size):
        mine = case.of_rank(rank, world_size)
        plan = mine.plan(tuning=SMALL)
        row_votes = torch.full((plan.num_tiles * rows_per_block * TILE + 7,), torch.nan, device=DEVICE)

        def sum_(votes: torch.Tensor) -> None:
            for other in told:
                votes += other
            told[:] = [votes.clone()]

        scores = mine.run(plan, combine=combine, ranks=BlockRanks(sum_, row_votes))
    # The last one has heard of all.
    case.check_scores(plan, scores, 1.0, combine)
    assert row_votes[-7:].isnan().all()


def test_a_plan_with_more_votes_than_the_ranks_hold():
    case = Case([(0, 140, 2)])
    plan = case.plan()
    votes = torch.empty(2 * plan.num_tiles * TILE - 1, device=DEVICE)
    with pytest.raises(ValueError, match="row_votes: expected 512 numbers or more, got 511"):
        case.run(plan, ranks=BlockRanks(print, votes))


def test_scale_of_stored_keys():
    Case([(0, 140, 2)], k_scale=0.25).check(vote_scale=0.7)


@pytest.mark.parametrize("order", ["ascending", "descending"])
def test_blocks_of_one_request_in_any_order(order):
    blocks = [(0, 40 + 50 * i, 1) for i in range(7)]
    Case(blocks[:: 1 if order == "ascending" else -1], heads=(2, 1)).check(tuning=SMALL)


def test_block_without_candidates_writes_nothing():
    Case([(0, 0, 2), (0, 70, 2), (1, 0, 1)], heads=(2, 1)).check()
    Case([(0, 0, 2)], heads=(2, 1)).check()


@pytest.mark.parametrize("combine", ["max", "sum"])
def test_large_logits(combine):
    """Logits of several hundred: most votes underflow, one is near 1, none is NaN or infinite."""
    case = Case([(0, 700, 2), (0, 800, 2)], head_dim=128, query_scale=30.0)
    plan = case.plan(num_multiprocessors=200)
    scores = case.run(plan, combine=combine)
    for block, start in enumerate(plan.tile_indptr.tolist()[:-1]):
        expected = case.reference(block, vote_scale=1.0, combine=combine)
        got = scores[start * TILE :][: case.blocks[block][1]]
        assert got.isfinite().all()
        assert_scores(got, expected)


def test_votes_of_a_row_sum_to_its_heads():
    case = Case([(0, 1234, 1)], rows_per_block=1)
    scores = case.run(case.plan())
    assert abs(scores[:1234].double().sum().item() - case.num_qo_heads) < 1e-4


def test_dirty_scratch_does_not_matter():
    """Twice with one scratch: what the first call left there changes nothing."""
    blocks = [(0, 300, 2), (1, 200, 2)]
    case = Case(blocks)
    plan, scratch = case.plan(), BlockScratch.allocate(8, 4, DEVICE)
    first, again = (torch.full((plan.num_tiles, TILE), torch.nan, device=DEVICE) for _ in range(2))
    call(case, plan, scratch=scratch, scores=first)
    call(case, plan, scratch=scratch, scores=again)
    torch.testing.assert_close(first, again, rtol=0, atol=0, equal_nan=True)


def test_strided_tensors():
    """Means, keys and table that are slices of larger tensors."""
    case = Case([(0, 140, 2), (0, 150, 2)])
    wide = torch.full((2 * case.means.shape[0], 9, 128), torch.nan, dtype=case.means.dtype, device=DEVICE)
    wide[::2, 3:7, :64] = case.means
    pool, table = case.keys.pool, case.keys.req_to_token
    wide_pool = torch.full((pool.shape[0], 2, 2, 64), torch.nan, dtype=pool.dtype, device=DEVICE)
    wide_pool[:, 0] = pool
    wide_table = torch.cat([table, table + 7], 1)
    case.means = wide[::2, 3:7, :64]
    case.keys = PagedKeys(wide_pool[:, 0], wide_table[:, : table.shape[1]])
    case.check()


def call(case: Case, plan: BlockPlan, **changes) -> None:
    arguments = {
        "means": case.means,
        "keys": case.keys,
        "plan": plan,
        "scratch": BlockScratch.allocate(case.means.shape[0], case.num_qo_heads, DEVICE),
        "scores": torch.full((plan.num_tiles, TILE), torch.nan, device=DEVICE),
        "num_sink": NUM_SINK,
        "vote_scale": 1.0,
        "combine": "max",
    }
    score_blocks(**(arguments | changes))


def empty(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=DEVICE)


def paged(pool: torch.Tensor) -> PagedKeys:
    return PagedKeys(pool, empty(2, 90, dtype=torch.int32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"means": empty(4, 4, 64, dtype=torch.bfloat16)}, "means: expected dtype torch.float16, got torch.bfloat16"),
        ({"means": empty(3, 4, 64)}, r"means: expected shape \[4, 4, 64\], got \[3, 4, 64\]"),
        ({"means": empty(4, 4, 64, 2)[..., 0]}, "means: expected a contiguous last dimension, got stride 2"),
        ({"keys": paged(empty(9, 2, 64, dtype=torch.bfloat16))}, "means: expected dtype torch.bfloat16, got"),
        ({"keys": paged(empty(9, 2, 128))}, r"means: expected shape \[4, 4, 128\]"),
        ({"keys": paged(empty(9, 3, 64))}, "num_qo_heads: expected a multiple of 3, got 4"),
        ({"scores": empty(3, TILE, dtype=torch.float32)}, "scores: expected 4 contiguous tiles or more, got 3"),
        ({"scores": empty(4 * TILE, dtype=torch.float32)}, r"scores: expected shape \['any', 128\], got \[512\]"),
        ({"scores": empty(9, TILE)}, "scores: expected dtype torch.float32, got torch.float16"),
        ({"scratch": BlockScratch.allocate(3, 4, DEVICE)}, "scratch: expected 4 rows or more, got 3"),
        ({"scratch": BlockScratch.allocate(4, 8, DEVICE)}, r"scratch.lse: expected shape \[4, 'any'\], got \[8, 4\]"),
        ({"vote_scale": 0.0}, "vote_scale: expected more than 0, got 0.0"),
        ({"combine": "mean"}, "combine: expected 'max' or 'sum', got 'mean'"),
    ],
)
def test_refusals(changes, message):
    case = Case([(0, 140, 2), (1, 150, 2)])
    with pytest.raises(ValueError, match=message):
        call(case, case.plan(), **changes)


@pytest.mark.parametrize(
    ("block", "sub_block", "message"),
    [
        (48, 16, "block // sub_block: expected a power of two up to 128, got 3"),
        (256, 1, "block // sub_block: expected a power of two up to 128, got 256"),
        (64, 24, "sub_block: expected a divisor of block=64, got 24"),
        (64, 0, "sub_block: expected a divisor of block=64, got 0"),
        (0, 1, "sub_block: expected a divisor of block=0, got 1"),
    ],
)
def test_rows_per_block(block, sub_block, message):
    with pytest.raises(ValueError, match=message):
        count_rows_per_block(block, sub_block)
    assert [count_rows_per_block(*sizes) for sizes in ((128, 1), (96, 48), (7, 7))] == [128, 2, 1]


def test_plan_of_a_long_chunk():
    """8,192 queries after 131,072 tokens on an H200: one round of programs in the first pass."""
    starts = range(131_072, 131_072 + 8192, 128)
    plan = plan_blocks(
        [3] * 64, [s - 640 for s in starts], [8] * 64, rows_per_block=8, num_qo_heads=32, num_multiprocessors=132
    )
    assert plan.logsumexp.row_tiles.tolist()[0] == [0, 16, 0, 131_072 - 640, 131_072 - 640 + 15 * 128, 0]
    assert plan.logsumexp.num_units == 4 * 2
    assert plan.votes.num_units == len(plan.votes.row_tiles) * plan.tile_indptr.diff().max().item()
    assert plan.num_tiles == sum(-(-(s - 640) // TILE) for s in starts)


def test_plan_of_many_branches():
    """32 requests go on by two blocks after the 65,536 tokens that they share: full row tiles read these once each."""
    requests = [request for request in range(32) for _ in range(2)]
    counts = [65_536 - 640, 65_536 - 512] * 32
    sizes = {"rows_per_block": 8, "num_qo_heads": 32, "num_multiprocessors": 132}
    _, num_common = order_blocks(requests, counts, [SharedSegment(tuple(range(32)), 0, 65_536)], num_sink=128)
    plan = plan_blocks(requests, counts, [8] * 64, num_common=num_common, **sizes)
    alone = plan_blocks(requests, counts, [8] * 64, **sizes)
    assert (plan.logsumexp.tuning, plan.votes.tuning) == (DEFAULT_TUNING.logsumexp, DEFAULT_TUNING.votes)
    assert plan.logsumexp.row_tiles.tolist() == [[first, 16, 0, *counts[:2], 0] for first in range(0, 64, 16)]
    assert (plan.logsumexp.num_units, plan.num_splits.tolist()) == (4 * 2, [2] * 64)
    assert (plan.votes.num_units, alone.votes.num_units) == (8 * 508, 32 * 508)


def test_long_branches_keep_small_row_tiles():
    """A short prefix in common does not make tiles of many rows, which would be empty in the branches."""
    shared = [SharedSegment(tuple(range(32)), 0, 1024)]
    requests, counts = [*range(32)], [65_536] * 32
    sizes = {"rows_per_block": 8, "num_qo_heads": 32, "num_multiprocessors": 132}
    _, num_common = order_blocks(requests, counts, shared, num_sink=0)
    plan, alone = (plan_blocks(requests, counts, [8] * 32, num_common=n, **sizes) for n in (num_common, ()))
    assert plan.votes.tuning.block_m == alone.votes.tuning.block_m == 16
    assert plan.votes.num_units == 16 * 8 + 32 * 504 and alone.votes.num_units == 32 * 512


def test_row_tiles_suit_the_work_as_a_whole():
    """Long runs of shared keys want many rows, own keys few. Where nothing is shared, the longest request decides."""
    sizes = {"rows_per_block": 8, "num_qo_heads": 32, "num_multiprocessors": 132}
    branches = plan_blocks([*range(32)], [36_864] * 32, [8] * 32, num_common=[32_768] * 31, **sizes)
    assert branches.logsumexp.tuning.block_m == 64
    alone = plan_blocks([0] * 64 + [*range(1, 32)], [65_536] * 95, [8] * 95, **sizes)
    assert alone.logsumexp.tuning == DEFAULT_TUNING.logsumexp


def test_shared_runs_leave_room_for_their_splits():
    """So many tokens would fill the scratch with 64 splits; where requests part within one, that makes 65."""
    longest = SPLITS[-1] * 6 * KEY_QUANTUM
    sizes = {"rows_per_block": 8, "num_qo_heads": 1, "num_multiprocessors": 132}
    alone = plan_blocks([0, 1], [longest] * 2, [8] * 2, **sizes)
    assert alone.num_splits.tolist() == [SPLITS[-1]] * 2
    plan = plan_blocks([0, 1], [longest] * 2, [8] * 2, num_common=[7 * KEY_QUANTUM], **sizes)
    assert SPLITS[-1] // 2 < plan.num_splits.max() <= SPLITS[-1]


def test_order_of_blocks():
    """Two groups that take turns; and blocks that have candidates in the first of two segments, or in both."""
    shared = [SharedSegment((0, 2), 0, 600), SharedSegment((1, 3), 0, 300)]
    assert order_blocks([0, 1, 2, 3, 4], [700] * 5, shared, num_sink=5) == ([4, 0, 2, 1, 3], [0, 512, 0, 256])
    shared = [SharedSegment((0, 1), 0, 700), SharedSegment((0, 1), 700, 1000)]
    blocks = ([0, 0, 1, 1, 2], [200, 900, 300, 900, 50])
    assert order_blocks(*blocks, shared, num_sink=5) == ([4, 0, 2, 1, 3], [0, 512, 512, 768])
    assert order_blocks(*blocks, [SharedSegment((0, 1), 0, 260)], num_sink=5)[1] == []
    assert order_blocks(*blocks, [SharedSegment((0, 3), 0, 700)], num_sink=5)[1] == [], "the other has no blocks"


def random_blocks(seed: int, num_requests: int, longest: int) -> tuple[list[tuple[int, int, int]], list[SharedSegment]]:
    """Blocks with two rows, and what their requests share: with some of their blocks, or beyond all of them."""
    choose = random.Random(seed)
    most = [choose.randint(1, longest) for _ in range(num_requests)]
    blocks = []
    for request, count in enumerate(most):
        step = choose.choice([1, 32, 300])
        candidates = [max(count - step * i, 0) * choose.choice([1] * 9 + [0]) for i in range(choose.randint(0, 4))]
        blocks += [(request, count, choose.randint(1, 2)) for count in reversed(candidates)]
    return [*blocks, (num_requests, 7, 1)], random_segments(choose, [NUM_SINK + count for count in most])


@pytest.mark.parametrize("levels", [MAX_LEVELS, 2, 0])
def test_runs_hold_each_candidate_once(monkeypatch, levels):
    """Of random trees, and with the splits of a block one after the other in its scratch."""
    monkeypatch.setattr("sglang_tokenselect.kernels.block_plan.MAX_LEVELS", levels)
    deepest = 0
    for seed in range(300):
        blocks, shared = random_blocks(seed, 2 + seed % 40, 20_000)
        requests, counts, rows = zip(*blocks, strict=True)
        order, num_common = order_blocks(requests, counts, shared, num_sink=NUM_SINK)
        assert sorted(order) == [*range(len(blocks))]
        requests, counts, rows = ([column[b] for b in order] for column in (requests, counts, rows))
        runs = cut_runs(requests, counts, num_common)
        held = [0] * len(blocks)
        for run in runs:
            assert run.begin % KEY_QUANTUM == 0 and run.level <= levels
            for b in run.blocks:
                assert held[b] == run.begin < run.end and run.begin < counts[b]
                assert run.end <= max(common_positions(requests[b], requests[run.blocks[0]], shared) - NUM_SINK, 0)
                held[b] = min(run.end, counts[b])
        assert held == counts
        deepest = max(deepest, *(run.level for run in runs))
        check_splits(requests, counts, rows, num_common)
    assert deepest == min(levels, deepest) and deepest > min(levels, 4) - 1


def common_positions(request: int, other: int, shared: list[SharedSegment]) -> int:
    if request == other:
        return 2**30
    return max((segment.end for segment in shared if {request, other} <= {*segment.rows}), default=0)


def check_splits(requests, counts, rows, num_common) -> None:
    """No two row tiles write a block's partial sums to one place, and all up to its last are written."""
    sizes = {"rows_per_block": 2, "num_qo_heads": 2, "num_multiprocessors": 132}
    plan = plan_blocks(requests, counts, rows, num_common=num_common, **sizes)
    assert plan.num_splits.max() <= SPLITS[-1]
    written = [[] for _ in counts]
    for first, num_blocks, begin, fewest, most, first_split in plan.logsumexp.row_tiles.tolist():
        assert begin * TILE < fewest <= most
        splits = -(-(most - begin * TILE) // plan.split_tokens)
        for b in range(first, first + num_blocks):
            written[b] += range(first_split, first_split + splits)
    for splits, count in zip(written, plan.num_splits.tolist(), strict=True):
        assert len({*splits}) == len(splits) and {*range(count)} <= {*splits}


def test_branches_at_many_depths():
    """More levels than a block may be in: the last requests read what they still share on their own."""
    num_requests = 2 * SPLITS[-1]
    blocks = [(request, KEY_QUANTUM * (request + 2), 2) for request in range(num_requests)]
    shared = [
        SharedSegment(tuple(range(first, num_requests)), KEY_QUANTUM * first, KEY_QUANTUM * (first + 1))
        for first in range(num_requests - 1)
    ]
    requests, counts, rows = (list(column) for column in zip(*blocks, strict=True))
    order, num_common = order_blocks(requests, counts, shared, num_sink=0)
    requests, counts = [requests[b] for b in order], [counts[b] for b in order]
    assert max(run.level for run in cut_runs(requests, counts, num_common)) == MAX_LEVELS
    check_splits(requests, counts, rows, num_common)


@pytest.mark.parametrize("num_common", [[256], [256, 256, 256], [256, 128]], ids=str)
def test_common_candidates_are_checked(num_common):
    with pytest.raises(ValueError, match="num_common: expected 2 multiples of 256, got"):
        cut_runs([0, 1, 2], [500] * 3, num_common)


# Two groups; in the first, some go on together, and one of them has all of its blocks in what the three share.
TREE = [
    SharedSegment((0, 1, 2, 4), 0, 300),
    SharedSegment((0, 2, 4), 300, 600),
    SharedSegment((2, 4), 600, 800),
    SharedSegment((3, 5), 0, 280),
]
BRANCHES = [
    *((0, 500 + 100 * i, 2) for i in range(3)),
    *((1, 100 + 150 * i, 1) for i in range(2)),
    *((2, 790 + 9 * i, 2) for i in range(2)),
    (3, 0, 2),
    (3, 270, 1),
    *((4, 150 + 300 * i, 1) for i in range(4)),
    (5, 400, 2),
    (6, 140, 1),
]
PAIRS = Tuning(logsumexp=PassTuning(32, 128, 4, 2), votes=PassTuning(16, 128, 4, 2))


def check_shared(case: Case, *, combine: str = "max", **options) -> tuple[BlockPlan, BlockPlan]:
    """Scores against float64, and against those of a plan that shares nothing. Returns both plans."""
    plan, alone = case.plan(**options), case.plan(is_shared=False, **options)
    scores = case.run(plan, combine=combine)
    case.check_scores(plan, scores, 1.0, combine)
    torch.testing.assert_close(scores, case.run(alone, combine=combine), rtol=1e-4, atol=1e-30, equal_nan=True)
    return plan, alone


@pytest.mark.parametrize("num_multiprocessors", [1, 200])
@pytest.mark.parametrize("combine", ["max", "sum"])
@pytest.mark.parametrize("tuning", [DEFAULT_TUNING, PAIRS], ids=["default", "small tiles"])
def test_requests_that_share_keys(tuning, combine, num_multiprocessors):
    """Nested, with blocks that end inside of what others share; in few splits and in many."""
    case = Case(BRANCHES, heads=(4, 2), shared=TREE)
    plan, alone = check_shared(case, combine=combine, tuning=tuning, num_multiprocessors=num_multiprocessors)
    assert plan.votes.num_units < alone.votes.num_units
    levels = [run.level for run in cut_runs(plan.req_pool_indices.tolist(), plan.num_candidates.tolist(), [])]
    assert levels == [0] * len(levels)
    assert len(plan.votes.runs) > len(levels) + 1


@pytest.mark.parametrize(("rows_per_block", "heads"), [(1, (7, 1)), (8, (2, 2)), (64, (2, 1))], ids=str)
def test_row_tiles_of_several_requests(rows_per_block, heads):
    """One row for each block, and two blocks that fill a tile."""
    blocks = [(request, count, min(rows, rows_per_block)) for request, count, rows in BRANCHES]
    check_shared(Case(blocks, rows_per_block=rows_per_block, heads=heads, shared=TREE))


@pytest.mark.parametrize("seed", range(9))
def test_random_trees(seed):
    blocks, shared = random_blocks(seed, 3 + seed % 4, 1000)
    check_shared(Case(blocks, heads=(2, 1), shared=shared, seed=seed), num_multiprocessors=[1, 20, 200][seed % 3])


@pytest.mark.parametrize("levels", [0, 1])
def test_fewer_levels_than_the_tree_has(monkeypatch, levels):
    monkeypatch.setattr("sglang_tokenselect.kernels.block_plan.MAX_LEVELS", levels)
    check_shared(Case(BRANCHES, heads=(2, 1), shared=TREE))


def test_shared_keys_are_read_through_one_row():
    """The other rows point at NaN."""
    shared = [SharedSegment((0, 1, 2), 0, NUM_SINK + 512)]
    case = Case([(r, 500 + 100 * r, 2) for r in range(3)], heads=(2, 1), shared=shared)
    plan, expected = case.plan(), case.run(case.plan())
    table = case.keys.req_to_token
    table[1:, NUM_SINK : NUM_SINK + 512] = table[0, -1]
    assert case.keys.pool[table[0, -1].long()].isnan().all()
    torch.testing.assert_close(case.run(plan), expected, rtol=0, atol=0, equal_nan=True)


def test_large_logits_of_shared_keys():
    """The largest logit of a row may lie in what it shares or behind it: neither part's sum may be NaN or infinite."""
    check_shared(Case(BRANCHES, heads=(2, 1), query_scale=30.0, shared=TREE), num_multiprocessors=200)


@pytest.mark.parametrize("num_blocks", range(1, 6))
def test_plan_on_the_device(num_blocks):
    """One copy; aligned whatever the number of blocks, so that Triton compiles no kernel for another alignment."""
    sizes = {"rows_per_block": 1, "num_qo_heads": 1, "num_multiprocessors": 4}
    plan = plan_blocks(range(num_blocks), [9] * num_blocks, [1] * num_blocks, **sizes)
    moved = to_device(plan, DEVICE)
    pairs = list(zip(plan_tensors(plan), plan_tensors(moved), strict=True))
    assert all(torch.equal(before, after.cpu()) for before, after in pairs)
    assert len({after.untyped_storage().data_ptr() for _, after in pairs}) == 1
    assert all(after.storage_offset() % 4 == 0 and after.device.type == DEVICE for _, after in pairs)


def plan_tensors(plan: BlockPlan) -> list[torch.Tensor]:
    tensors = [plan.req_pool_indices, plan.num_candidates, plan.num_rows, plan.tile_indptr, plan.num_splits]
    return [*tensors, *(t for tiling in (plan.logsumexp, plan.votes) for t in (tiling.row_tiles, tiling.runs))]


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=NEEDS_CUDA)], ids=str)
@pytest.mark.parametrize(
    ("block", "sub_block"), [(128, 16), (128, 128), (64, 4), (64, 1), (96, 48)], ids=lambda n: str(n)
)
def test_mean_queries(block, sub_block, dtype):
    """Blocks that start and end inside a block and a sub-block, of three requests, out of order in the queries."""
    spans = [(3 * block + 5, 4 * block), (block, 2 * block), (7 * block - 1, 7 * block), (2 * block, 2 * block + 50)]
    rows_per_block = block // sub_block
    heads, head_dim = 2, 64
    query = torch.randn(sum(e - s for s, e in spans) + 9, heads + 1, 2 * head_dim).to(DEVICE, dtype)[:, 1:, :head_dim]
    first_query = [9]
    for start, end in spans[:-1]:
        first_query.append(first_query[-1] + end - start)
    order = [2, 0, 3, 1]
    out = torch.full((4 * rows_per_block, heads, head_dim), torch.nan, dtype=dtype, device=DEVICE)
    columns = zip(*((first_query[i], spans[i][1] - spans[i][0], spans[i][0]) for i in order), strict=True)
    columns = [torch.tensor(column, dtype=torch.int32, device=DEVICE) for column in columns]
    mean_queries(query, *columns, sub_block=sub_block, rows_per_block=rows_per_block, out=out)

    rounding = torch.finfo(dtype).eps / 2
    for i, rows in zip(order, out.unflatten(0, (4, rows_per_block)), strict=True):
        start, end = spans[i]
        expected = prefill.mean_queries(query[first_query[i] :][: end - start].double(), start, sub_block)
        error = (rows[: len(expected)].double() - expected).abs()
        assert (error <= 1.001 * rounding * expected.abs() + 1e-6).all()
        assert (rows[len(expected) :] == 0).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": empty(9, 2, 64, dtype=torch.float32)}, "query: expected dtype torch.bfloat16 or torch.float16"),
        ({"query": empty(9, 2, 96), "out": empty(4, 2, 96)}, "query: expected head_dim to be a power of two, got 96"),
        ({"start": empty(2, dtype=torch.int64)}, "start: expected dtype torch.int32, got torch.int64"),
        ({"num_queries": empty(3, dtype=torch.int32)}, r"num_queries: expected shape \[2\], got \[3\]"),
        ({"out": empty(3, 2, 64)}, r"out: expected shape \[4, 2, 64\], got \[3, 2, 64\]"),
        ({"sub_block": 0}, "sub_block: expected at least 1, got 0"),
    ],
)
def test_mean_queries_refusals(changes, message):
    ints = {name: empty(2, dtype=torch.int32) for name in ("first_query", "num_queries", "start")}
    arguments = {"query": empty(9, 2, 64), **ints, "sub_block": 16, "rows_per_block": 2, "out": empty(4, 2, 64)}
    with pytest.raises(ValueError, match=message):
        mean_queries(**(arguments | changes))


def test_scores_of_queries():
    """Both steps: a first block that a radix hit shortens, whole ones, a last one that the extend's end shortens."""
    block, sub_block, num_local = 32, 8, 16
    start, end = 3 * block + 19, 6 * block + 13
    case = Case([(0, end, 1)], rows_per_block=4, seed=4)
    spans = list(prefill.cut_blocks(start, end, block))
    query = torch.randn(end - start, 4, 64, generator=torch.Generator().manual_seed(9)).to(DEVICE, torch.float16)
    case.blocks = [(0, s - num_local - NUM_SINK, -(-e // sub_block) - s // sub_block) for s, e in spans]
    case.means = torch.full((len(spans) * 4, 4, 64), torch.nan, dtype=torch.float16, device=DEVICE)
    columns = zip(*((s - start, e - s, s) for s, e in spans), strict=True)
    columns = [torch.tensor(column, dtype=torch.int32, device=DEVICE) for column in columns]
    mean_queries(query, *columns, sub_block=sub_block, rows_per_block=4, out=case.means)
    assert [rows for _, _, rows in case.blocks] == [2, 4, 4, 2]
    case.check(vote_scale=0.2)


@BIG
@pytest.mark.parametrize(("dtype", "key_dtype"), DTYPES)
@pytest.mark.parametrize("combine", ["max", "sum"])
@pytest.mark.parametrize("rows_per_block", [1, 8, 32])
def test_long_context(dtype, key_dtype, combine, rows_per_block):
    """131,072 tokens beside shorter requests, with the tiles and splits of the real machine."""
    blocks = [(0, 131_072 + 128 * i, rows_per_block) for i in range(20)] + [(1, 9001, rows_per_block), (2, 40_001, 1)]
    case = Case(blocks, rows_per_block=rows_per_block, heads=(28, 4), head_dim=128, dtype=dtype, key_dtype=key_dtype)
    case.check(combine=combine, vote_scale=0.5)


@BIG
@pytest.mark.parametrize(("dtype", "key_dtype"), DTYPES)
@pytest.mark.parametrize("rows_per_block", [1, 8, 32])
def test_many_branches(dtype, key_dtype, rows_per_block):
    """32 requests of unlike lengths that share 32,768 tokens, half of them 1,000 more."""
    shared = [SharedSegment(tuple(range(32)), 0, 32_768), SharedSegment(tuple(range(0, 32, 2)), 32_768, 33_768)]
    blocks = [(r, 32_300 + 128 * i + 7 * r, rows_per_block) for r in range(32) for i in range(1 + 3 * (r % 5))]
    case = Case(
        blocks, rows_per_block=rows_per_block, heads=(28, 4), head_dim=128, dtype=dtype, key_dtype=key_dtype,
        shared=shared,
    )  # fmt: skip
    check_shared(case)


@BIG
@pytest.mark.parametrize("votes", [(64, 128, 4, 3), (64, 256, 8, 3), (128, 64, 4, 3)], ids=str)
@pytest.mark.parametrize("logsumexp", [(64, 128, 4, 3), (128, 256, 8, 2), (64, 64, 4, 4)], ids=str)
def test_tunings(votes, logsumexp):
    tuning = Tuning(logsumexp=PassTuning(*logsumexp), votes=PassTuning(*votes))
    blocks = [(0, 9001 + 100 * i, 8) for i in range(20)]
    Case(blocks, rows_per_block=8, heads=(8, 2), head_dim=128, dtype=torch.bfloat16).check(tuning=tuning)
