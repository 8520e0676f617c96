# SPDX-License-Identifier: Apache-2.0
"""Scoring a shared prefix once against scoring it for each row, and against float64, on random trees of requests."""

from __future__ import annotations

import random

import pytest
import torch
from accelerator import BIG, DEVICE, DTYPES
from paged import SCORE_RTOL, DecodeStep, PagedBatch, poison
from shared_trees import random_segments

from sglang_tokenselect.kernels.reference.window import Window
from sglang_tokenselect.kernels.select_decode import DecodePart
from sglang_tokenselect.kernels.shared_plan import SharedPlan, SharedPrefixes, TileSegment
from sglang_tokenselect.kernels.shared_segment import MAX_SEGMENTS, SharedSegment
from sglang_tokenselect.kernels.workspace import TILE

WINDOW = Window(num_sink=5, budget=40, num_local=12)
LENGTHS = [700, 650, 900, 333, 780, 655]
TREE = (
    SharedSegment((0, 1, 2, 4, 5), 0, 300),
    SharedSegment((0, 2, 4), 300, 600),
    SharedSegment((2, 4), 600, 777),
    SharedSegment((1, 5), 300, 640),
)


def random_tree(seed: int, num_rows: int, longest: int) -> tuple[list[int], list[SharedSegment]]:
    """Lengths of requests, and what they share."""
    choose = random.Random(seed)
    lengths = [choose.randint(1, longest) for _ in range(num_rows)]
    return lengths, random_segments(choose, lengths)


def scores(step: DecodeStep) -> list[torch.Tensor]:
    """What each row that votes left in the scratch of a batch in one part."""
    found, first = [], 0
    for count in step.candidates():
        found.append(step.workspace.scores[first:].flatten()[:count].clone())
        first += -(-count // TILE)
    return found


def check_shared(paged: PagedBatch, shared, window: Window = WINDOW, **options) -> DecodeStep:
    """Selects alone and together. Returns the step that shared."""
    alone = DecodeStep(paged, window, **options)
    alone.run()
    together = DecodeStep(paged, window, shared=shared, **options)
    for row, positions in enumerate(together.run()):
        together.check(row, positions)
    for expected, found in zip(scores(alone), scores(together), strict=True):
        torch.testing.assert_close(found, expected, rtol=SCORE_RTOL, atol=1e-30)
    assert (together.workspace.maxima == -1).all() and (together.workspace.arrivals == 0).all()
    return together


@pytest.mark.parametrize("seed", range(12))
def test_random_trees(seed):
    lengths, shared = random_tree(seed, num_rows=3 + seed % 9, longest=900)
    budgets = [random.Random(seed + row).choice([40, 40, 17, 0, 64, -1]) for row in range(len(lengths))]
    check_shared(PagedBatch(lengths, shared=shared, seed=seed), shared, budgets=budgets, max_budget=64)


def test_the_shared_part_is_read_once():
    """By the slots of each segment's first voter alone: those of the others may point to NaN."""
    paged = PagedBatch(LENGTHS, shared=TREE)
    alone = DecodeStep(paged, WINDOW)
    alone.run()
    step = DecodeStep(paged, WINDOW, shared=TREE)
    plan = SharedPlan.of(TREE, step.candidates(), num_sink=WINDOW.num_sink, min_rows=2)
    for segment in plan.segments:
        positions = slice(WINDOW.num_sink + segment.first_tile * TILE, WINDOW.num_sink + segment.end_tile * TILE)
        for row in segment.rows[1:]:
            paged.table[paged.req_pool_indices[row], positions] = paged.table[paged.req_pool_indices[row], -1]
    step.plan()
    step.launch()
    for expected, found in zip(scores(alone), scores(step), strict=True):
        torch.testing.assert_close(found, expected, rtol=SCORE_RTOL, atol=1e-30)


@pytest.mark.parametrize(("dtype", "key_dtype"), DTYPES)
@pytest.mark.parametrize("heads", [(1, 1), (8, 8), (6, 2), (7, 1), (14, 2), (16, 1)], ids=lambda h: f"{h[0]}q{h[1]}kv")
@pytest.mark.parametrize("head_dim", [64, 128])
def test_heads_and_dtypes(heads, head_dim, dtype, key_dtype):
    paged = PagedBatch(
        LENGTHS, heads=heads, head_dim=head_dim, dtype=dtype, key_dtype=key_dtype, k_scale=0.5, shared=TREE
    )
    check_shared(paged, TREE, vote_scale=0.25)


@pytest.mark.parametrize("num_rows", [2, 9, 35])
def test_more_rows_than_a_chunk_holds(num_rows):
    """35 rows of 7 heads in a group, 8 with padding: chunks of 16 rows, the last one not full."""
    shared = [SharedSegment(tuple(range(num_rows)), 0, 270), SharedSegment(tuple(range(1, num_rows, 2)), 270, 401)]
    shared = [segment for segment in shared if len(segment.rows) > 1]
    paged = PagedBatch([420 + row for row in range(num_rows)], heads=(7, 1), shared=shared)
    check_shared(paged, shared)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 30.0], ids=lambda x: f"query*{x}")
def test_flat_and_peaked_votes(scale):
    paged = PagedBatch(LENGTHS, shared=TREE)
    paged.query *= scale
    step = DecodeStep(paged, WINDOW, shared=TREE)
    for row, positions in enumerate(step.run()):
        step.check(row, positions)


def test_hits_inside_a_group():
    """Rows that reuse their vote are left out, the first members too; a group without voters does nothing."""
    paged = PagedBatch([length + 4 for length in LENGTHS], max_len=910, shared=TREE)
    paged.seq_lens = LENGTHS
    step = DecodeStep(paged, WINDOW, shared=TREE, theta=-1.0)
    step.run()
    votes = len(LENGTHS)
    for forgotten in ([], [1, 4], [5], [0, 1, 2, 3, 4, 5]):
        step.batch.seq_lens.add_(1)
        ages = (step.batch.seq_lens - step.cache.seq_len[: len(LENGTHS)]).tolist()
        step.cache.seq_len[forgotten] = 0
        poison(step.workspace)
        for row, positions in enumerate(step.run()):
            step.check(row, positions, age=0 if row in forgotten else ages[row])
        votes += len(forgotten)
        assert step.cache.counters.tolist()[1] == votes


@pytest.mark.parametrize("limits", [{"max_candidates": 1500}, {"max_own_candidates": 900}], ids=str)
def test_parts_cut_groups(limits):
    paged = PagedBatch([*LENGTHS, 900, 900], shared=TREE)
    step = DecodeStep(paged, WINDOW, shared=TREE, **limits)
    for row, positions in enumerate(step.run()):
        step.check(row, positions)
    assert len(step.parts) > 1


def test_sharing_needs_less_scratch():
    step = DecodeStep(PagedBatch(LENGTHS, shared=TREE), WINDOW, shared=TREE, max_own_candidates=1500)
    step.run()
    assert len(step.parts) == 1
    assert len(step.workspace.cut_rows(step.candidates())) > 1


def test_nan_in_a_query_stays_with_its_request():
    paged = PagedBatch(LENGTHS, shared=TREE)
    paged.query[2, 1] = torch.nan
    step = DecodeStep(paged, WINDOW, shared=TREE)
    for row, positions in enumerate(step.run()):
        if row != 2:
            step.check(row, positions)
    assert len(set(positions)) == WINDOW.size


def test_plan():
    """Whole tiles; a child takes over where its parent had to stop; rows without candidates do not count."""
    shared = [
        SharedSegment((0, 1, 2, 3), 0, 1000),
        SharedSegment((0, 1, 2), 1000, 2000),
        SharedSegment((0, 1), 2000, 2100),
    ]
    plan = SharedPlan.of(shared, [5000, 5000, 1999, 600], num_sink=100, min_rows=2)
    assert plan.segments == (
        TileSegment((0, 1, 2, 3), 0, 4, -1),
        TileSegment((0, 1, 2), 4, 14, 0),
        TileSegment((0, 1), 14, 15, 1),
    )
    assert plan.shared_tiles == (15, 15, 14, 4) and plan.segment == (2, 2, 1, 0)
    plan = SharedPlan.of(shared, [5000, 5000, 1999, 0], num_sink=100, min_rows=3)
    assert plan.segments == (TileSegment((0, 1, 2), 0, 7, -1), TileSegment((0, 1, 2), 7, 14, 0))
    assert not SharedPlan.of(shared, [5000, 0, 0, 0], num_sink=100, min_rows=2).segments
    assert not SharedPlan.of(shared, [5000, 100, 100, 100], num_sink=100, min_rows=2).segments[:-1]


def test_as_many_segments_as_there_may_be():
    pairs = [SharedSegment((2 * i, 2 * i + 1), 0, 200) for i in range(MAX_SEGMENTS)]
    paged = PagedBatch([220 + i % 7 for i in range(2 * MAX_SEGMENTS)], shared=pairs)
    step = check_shared(paged, pairs)
    assert isinstance(step.parts[0].shared, SharedPrefixes)


@BIG
@pytest.mark.parametrize("heads", [(32, 8), (28, 4)], ids=["32q8kv", "28q4kv"])
@pytest.mark.parametrize("num_rows", [4, 32, 65])
def test_large(heads, num_rows):
    rows = tuple(range(num_rows))
    shared = [SharedSegment(rows, 0, 65_536), SharedSegment(rows[: num_rows // 2], 65_536, 66_000)]
    paged = PagedBatch(
        [66_560 + 3 * row for row in rows], heads=heads, head_dim=128, dtype=torch.bfloat16, shared=shared
    )
    paged.query *= 0.3
    check_shared(paged, shared, Window(128, 2048, 512))


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU: CUDA graphs")
def test_graph_replays_with_other_groups():
    """Captured with no group at all, replayed with those of other trees, and with none."""
    longest = 900
    _, shared = random_tree(99, num_rows=8, longest=longest)
    memory = torch.zeros(SharedPrefixes.count_ints(8), dtype=torch.int32)
    SharedPlan.of(shared, [0] * 8, num_sink=WINDOW.num_sink, min_rows=2).write(memory)
    device_memory = memory.cuda()
    step = DecodeStep(PagedBatch([longest] * 8, max_len=longest), WINDOW, theta=2.0)
    step.run()
    step.parts[0] = DecodePart(range(8), SharedPrefixes.view(device_memory, 8))
    step.launch()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step.launch()
    captured = step.parts
    for seed in range(20):
        lengths, shared = random_tree(seed, num_rows=8, longest=longest)
        other = PagedBatch(lengths, max_len=longest, shared=shared, seed=seed)
        for mine, its in (
            (step.paged.keys.pool, other.keys.pool),
            (step.paged.table, other.table),
            (step.paged.query, other.query),
            (step.paged.req_pool_indices, other.req_pool_indices),
        ):
            mine.copy_(its)
        step.paged.slots = other.slots
        step.batch.seq_lens.copy_(torch.tensor(lengths))
        plan = SharedPlan.of(shared if seed % 5 else [], step.candidates(), num_sink=WINDOW.num_sink, min_rows=2)
        plan.write(memory)
        device_memory.copy_(memory)
        step.plan()
        step.parts = captured
        graph.replay()
        for row, positions in enumerate(step.positions()):
            step.check(row, positions)


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU: programmatic dependent launch")
def test_overlapping_launches_change_nothing():
    """Layers one after the other, in graphs, while who votes changes: bit for bit as without overlap."""
    found = {pdl: walk_layers(pdl) for pdl in (False, True)}
    for step, (one, other) in enumerate(zip(found[False], found[True], strict=True)):
        assert one.equal(other), f"step {step}"


def walk_layers(pdl: bool, num_steps: int = 300) -> list[torch.Tensor]:
    """The slots that three layers chose in each step."""
    paged = [PagedBatch([n + num_steps for n in LENGTHS], shared=TREE, seed=seed) for seed in range(3)]
    layers = [DecodeStep(batch, WINDOW, shared=TREE, theta=-1.0) for batch in paged]
    layers[0].workspace.pdl = pdl
    for layer in layers:
        layer.batch.seq_lens.copy_(torch.tensor(LENGTHS))
        layer.workspace, layer.rows = layers[0].workspace, layers[0].rows
        layer.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for layer in layers:
            layer.launch()
    choose, found = random.Random(0), []
    for _ in range(num_steps):
        for layer in layers:
            layer.batch.seq_lens.add_(1)
            layer.cache.seq_len[choose.sample(range(len(LENGTHS)), k=choose.randint(0, len(LENGTHS)))] = 0
            layer.kv_indices.fill_(-7)
        graph.replay()
        found.append(torch.cat([layer.kv_indices for layer in layers]))
    return found


def test_errors_name_what_they_expected():
    step = DecodeStep(PagedBatch(LENGTHS, heads=(9, 9), shared=TREE), WINDOW, shared=TREE)
    with pytest.raises(ValueError, match="num_kv_heads: expected at most 8 where rows share tiles, got 9"):
        step.run()
    step = DecodeStep(PagedBatch(LENGTHS, shared=TREE), WINDOW, shared=TREE, vote_scale=-1.0)
    with pytest.raises(ValueError, match="vote_scale: expected more than 0 where rows share tiles, got -1.0"):
        step.run()
    step.parts = [DecodePart(range(2), step.parts[0].shared)]
    with pytest.raises(ValueError, match="parts: expected shared tiles of 2 rows, got 6"):
        step.launch()
    with pytest.raises(ValueError, match="segments: expected at most 64 with 2048 members, got 65 with 130"):
        SharedPlan.of([SharedSegment((0, 1), 0, 200)] * 65, [300, 300], num_sink=5, min_rows=2)
