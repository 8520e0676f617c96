# SPDX-License-Identifier: Apache-2.0
"""Decode selection against the float64 reference: Triton's interpreter without a GPU, native with one."""

from __future__ import annotations

import pytest
import torch
from accelerator import BIG, DEVICE, DTYPES
from paged import DecodeStep, PagedBatch, poison

from sglang_tokenselect.kernels.paged_keys import PagedKeys
from sglang_tokenselect.kernels.reference.window import Window
from sglang_tokenselect.kernels.workspace import DecodeWorkspace, WorkspaceLimits

WINDOW = Window(num_sink=5, budget=40, num_local=12)


def check_step(step: DecodeStep) -> None:
    for row, positions in enumerate(step.run()):
        step.check(row, positions)


@pytest.mark.parametrize(
    "seq_lens",
    [[1], [WINDOW.size], [WINDOW.size + 1], [63, 100, 111, 2000], [1, 58, 400, 57, 129, 640], [57 + 128, 57 + 129]],
    ids=lambda lens: "-".join(map(str, lens)),
)
def test_selection_is_the_references(seq_lens):
    """Length 1, below, at and just above the window, odd sizes, whole tiles, all mixed in one batch."""
    check_step(DecodeStep(PagedBatch(seq_lens), WINDOW))


@pytest.mark.parametrize(("dtype", "key_dtype"), DTYPES)
@pytest.mark.parametrize("heads", [(1, 1), (8, 8), (6, 2), (7, 1), (14, 2), (16, 1)], ids=lambda h: f"{h[0]}q{h[1]}kv")
@pytest.mark.parametrize("head_dim", [64, 128])
def test_heads_and_dtypes(heads, head_dim, dtype, key_dtype):
    paged = PagedBatch([300, 58, 431], heads=heads, head_dim=head_dim, dtype=dtype, key_dtype=key_dtype, k_scale=0.5)
    check_step(DecodeStep(paged, WINDOW, vote_scale=0.25))


@pytest.mark.parametrize("window", [Window(0, 40, 0), Window(0, 1, 7), Window(9, 0, 7), Window(130, 40, 1)], ids=str)
def test_edges_of_the_window(window):
    """No sink, no local window, a budget of nothing, a sink that is no multiple of anything."""
    check_step(DecodeStep(PagedBatch([500, 141]), window, max_budget=64))


def test_every_row_has_its_own_budget():
    check_step(DecodeStep(PagedBatch([500, 500, 500, 500]), WINDOW, budgets=[1, 0, 63, 64], max_budget=64))


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 30.0], ids=lambda x: f"query*{x}")
def test_flat_and_peaked_votes(scale):
    """A query of zeros makes all scores equal: the first candidates win. Large logits must not overflow."""
    paged = PagedBatch([600, 301])
    paged.query *= scale
    step = DecodeStep(paged, WINDOW)
    for row, positions in enumerate(step.run()):
        if scale:
            step.check(row, positions)
        else:
            assert positions[5:45] == list(range(5, 45))


def test_nan_in_a_query_keeps_the_lengths():
    """A broken request gets some selection of the right length; its neighbours get theirs."""
    paged = PagedBatch([600, 301])
    paged.query[0, 1] = torch.nan
    step = DecodeStep(paged, WINDOW)
    broken, sound = step.run()
    assert len(set(broken)) == WINDOW.size and broken == sorted(broken)
    step.check(1, sound)


@pytest.mark.parametrize(("max_candidates", "num_parts"), [(None, 1), (700, 2), (500, 2)])
def test_a_batch_in_parts_selects_the_same(max_candidates, num_parts):
    paged = PagedBatch([500, 57, 320, 1, 444, 380, 700, 666])
    step = DecodeStep(paged, WINDOW, max_candidates=max_candidates)
    check_step(step)
    assert len(step.parts) == num_parts


def test_more_rows_than_the_smallest_block():
    check_step(DecodeStep(PagedBatch([50 + 9 * row for row in range(17)]), WINDOW))


@pytest.mark.parametrize("max_candidates", [None, 500])
@pytest.mark.parametrize("window", [WINDOW, Window(0, 40, 0)], ids=str)
def test_rows_that_the_caller_writes(window, max_candidates):
    """Budget -1: such rows stay as they are, and so do their cache entries, whatever these hold."""
    budgets = [-1, 40, -1, 17, -1, 40, 0, -1]
    slots = [0, 1, 2, 3, -1, -1, 4, -1]
    step = DecodeStep(
        PagedBatch([300, 500, 40, 411, 444, 320, 200, 1]),
        window,
        budgets=budgets,
        cache_slots=slots,
        max_candidates=max_candidates,
        theta=-1.0,
    )
    step.batch.req_pool_indices[7] = 0  # the padding of a CUDA graph
    step.cache.seq_len[[0, 2]] = torch.tensor([299, 39], dtype=torch.int32, device=DEVICE)
    step.cache.vote_len[[0, 2]] = 40
    before = {name: tensor.clone() for name, tensor in vars(step.cache).items()}
    check_step(step)
    assert step.cache.counters.tolist() == [0, 3]
    for name in ("query", "vote", "vote_len", "seq_len", "cut"):
        was, now = before[name][[0, 2]], getattr(step.cache, name)[[0, 2]]
        torch.testing.assert_close(now, was, rtol=0, atol=0, equal_nan=True)


def test_a_batch_that_the_caller_writes():
    step = DecodeStep(PagedBatch([300, 1, 58]), WINDOW, budgets=[-1] * 3)
    assert step.run() == [[], [], []]
    for name, numbers in vars(step.rows).items():
        assert not numbers.any(), name
    assert step.cache.counters.tolist() == [0, 0]
    assert (step.workspace.maxima == -1).all() and (step.workspace.arrivals == 0).all()


def test_a_row_does_not_depend_on_its_neighbours():
    together = DecodeStep(PagedBatch([500, 320, 444]), WINDOW)
    expected = together.run()
    paged = together.paged
    paged.req_pool_indices, paged.seq_lens = paged.req_pool_indices[1:2], [320]
    paged.slots, paged.query = paged.slots[1:2], paged.query[1:2]
    assert DecodeStep(paged, WINDOW).run()[0] == expected[1]


def test_a_used_workspace_is_as_good_as_a_new_one():
    step = DecodeStep(PagedBatch([500, 320, 444]), WINDOW, theta=2.0)
    first = step.run()
    poison(step.workspace)
    step.paged.query[1] *= 0.5
    step.run()
    step.paged.query[1] *= 2
    assert step.run() == first


@BIG
@pytest.mark.parametrize(
    ("seq_lens", "budget"),
    [([131_072, 3_000, 65_537], 2048), ([1_048_576], 2048), ([40_000] * 33, 2048), ([131_072, 20_000], 8192)],
    ids=["ragged", "1M", "33-rows", "budget-8192"],
)
@pytest.mark.parametrize("heads", [(32, 8), (28, 4)], ids=["32q8kv", "28q4kv"])
def test_large(seq_lens, budget, heads):
    paged = PagedBatch(seq_lens, heads=heads, head_dim=128, dtype=torch.bfloat16)
    paged.query *= 0.3
    check_step(DecodeStep(paged, Window(128, budget, 512)))


@BIG
def test_large_with_heavy_ties():
    """All scores equal: the first candidates win."""
    paged = PagedBatch([131_072, 9_000], heads=(8, 2), head_dim=128, dtype=torch.bfloat16)
    paged.query.zero_()
    for positions in DecodeStep(paged, Window(128, 2048, 512)).run():
        assert positions[128 : 128 + 2048] == list(range(128, 128 + 2048))


def test_errors_name_what_they_expected():
    paged = PagedBatch([100, 90])
    step = DecodeStep(paged, WINDOW)
    step.plan()
    paged.query = paged.query[:, :2]
    with pytest.raises(ValueError, match=r"query: expected \(2, 4, 64\)"):
        step.launch()
    pool = torch.zeros(9, 2, 64)
    table = torch.zeros(2, 9, dtype=torch.int32)
    with pytest.raises(ValueError, match="expected one of .*got torch.float32"):
        PagedKeys(pool, table)
    with pytest.raises(ValueError, match=r"head_dim in \(64, 128\)\], got \[9, 2, 80\]"):
        PagedKeys(torch.zeros(9, 2, 80, dtype=torch.float16), table)
    with pytest.raises(ValueError, match="req_to_token: expected int32"):
        PagedKeys(pool.half(), table.long())
    with pytest.raises(ValueError, match="max_budget: expected 1 to 8192, got 8193"):
        WorkspaceLimits(1, 100, 100, 8193)
    with pytest.raises(ValueError, match="max_candidates: expected 100, max_seq_len, or more, got 99"):
        WorkspaceLimits(1, 99, 100, 64)
    with pytest.raises(ValueError, match="num_qo_heads: expected a multiple of 2, got 3"):
        DecodeWorkspace(WorkspaceLimits(1, 100, 100, 64), 3, 2, DEVICE)
    with pytest.raises(ValueError, match="max_own_candidates: expected 100, max_seq_len, or more, got 99"):
        DecodeWorkspace(WorkspaceLimits(1, 100, 100, 64), 4, 2, DEVICE, max_own_candidates=99)
