# SPDX-License-Identifier: Apache-2.0
"""Block selection in prefill against naive float64 loops, and its independence of the chunks."""

from __future__ import annotations

import dataclasses

import naive
import pytest
import torch

from sglang_tokenselect.kernels.reference.positions import Rope
from sglang_tokenselect.kernels.reference.prefill import (
    cut_blocks,
    first_sparse_position,
    mean_queries,
    select_for_block,
)
from sglang_tokenselect.kernels.reference.window import Window

WINDOW = Window(num_sink=2, budget=5, num_local=3)
THETA = 100.0


def test_blocks_are_cut_at_absolute_multiples():
    assert list(cut_blocks(5, 21, 8)) == [(5, 8), (8, 16), (16, 21)]
    assert list(cut_blocks(8, 16, 8)) == [(8, 16)]
    assert list(cut_blocks(7, 7, 8)) == []


def test_early_blocks_are_dense():
    """A block that starts within the window of 10 tokens attends to all of its past."""
    assert first_sparse_position(0, 64, 4, WINDOW) == 12
    assert first_sparse_position(0, 64, 5, WINDOW) == 15
    assert first_sparse_position(11, 64, 4, WINDOW) == 11
    assert first_sparse_position(0, 10, 4, WINDOW) == 10


def test_blocks_up_to_min_len_are_dense():
    window = dataclasses.replace(WINDOW, min_len=31)
    assert first_sparse_position(0, 64, 4, window) == 32
    assert first_sparse_position(0, 64, 31, window) == 62
    assert first_sparse_position(31, 64, 4, window) == 32
    assert first_sparse_position(0, 64, 4, dataclasses.replace(WINDOW, min_len=9)) == 12


@pytest.mark.parametrize("start", [12, 13, 14])
def test_sub_blocks_are_cut_at_absolute_multiples(start):
    query = torch.randn(16 - start + 3, 2, 4, dtype=torch.float64)
    rows = mean_queries(query, start, 4)
    cuts = [(start, 16), (16, 19)]
    assert rows.shape[0] == len(cuts)
    for row, (lo, hi) in zip(rows, cuts, strict=True):
        torch.testing.assert_close(row, query[lo - start : hi - start].mean(0))


@pytest.mark.parametrize("combine", ["max", "sum"])
@pytest.mark.parametrize("compact", [False, True], ids=["absolute", "compact"])
@pytest.mark.parametrize("start", [11, 24, 61], ids=lambda s: f"start{s}")
@pytest.mark.parametrize(("num_qo_heads", "num_kv_heads"), [(4, 2), (3, 1)])
def test_block_selection(combine, compact, start, num_qo_heads, num_kv_heads):
    torch.manual_seed(start)
    query = torch.randn(7, num_qo_heads, 8, dtype=torch.float64)
    keys = torch.randn(start + 7, num_kv_heads, 8, dtype=torch.float64)
    rope = Rope.from_theta(THETA, 8, 64, dtype=torch.float64) if compact else None
    ranked = select_for_block(
        query, keys[WINDOW.num_sink :], start, WINDOW, sub_block=4, combine=combine, rope=rope, vote_scale=0.9
    )

    scored = query
    if compact:
        scored = torch.stack([naive.rotate(row, WINDOW.num_local + r, THETA) for r, row in enumerate(query)])
    candidates = keys[WINDOW.num_sink : start - WINDOW.num_local]
    rows = [scored[lo - start : hi - start].mean(0) for lo, hi in cut_blocks(start, start + 7, 4)]
    votes = [naive.score(row, candidates, 0.9) for row in rows]
    fold = max if combine == "max" else sum
    expected = naive.ranking([fold(column) for column in zip(*votes, strict=True)], WINDOW.budget)
    assert (ranked - WINDOW.num_sink).tolist() == expected


def test_one_sub_block_is_the_mean_of_the_paper():
    """sub_block = block: one row of votes, from the mean query, so max and sum agree."""
    query, keys = torch.randn(8, 2, 8), torch.randn(40, 1, 8)
    by_max, by_sum = (
        select_for_block(query, keys, 32, WINDOW, sub_block=8, combine=combine) for combine in ("max", "sum")
    )
    assert torch.equal(by_max, by_sum)


def test_selection_refuses_a_dense_block():
    with pytest.raises(ValueError, match="start: expected more than the window of 10 tokens, got 10"):
        select_for_block(torch.zeros(4, 1, 8), torch.zeros(20, 1, 8), 10, WINDOW, sub_block=4)
