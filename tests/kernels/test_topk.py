# SPDX-License-Identifier: Apache-2.0
"""Exact top-k of given scores: ties to the lower position, any budget, whatever the scores."""

from __future__ import annotations

import pytest
import torch
from accelerator import BIG, DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from paged import UNWRITTEN, poison

from sglang_tokenselect.kernels.emit import emit
from sglang_tokenselect.kernels.reference.vote import rank_candidates
from sglang_tokenselect.kernels.rows import SelectionRows
from sglang_tokenselect.kernels.vote import take_scores
from sglang_tokenselect.kernels.workspace import TILE, Workspace, WorkspaceLimits

NUM_SINK, NUM_LOCAL = 3, 4


def choose(rows: list[torch.Tensor], budgets: list[int], *, max_budget: int) -> list[list[int]]:
    """Candidates chosen of each row. Checks the slots around them, and that nothing else is written."""
    lengths = [NUM_SINK + len(scores) + NUM_LOCAL for scores in rows]
    limits = WorkspaceLimits(len(rows), max(sum(map(len, rows)), max(lengths)), max(lengths), max_budget)
    workspace = Workspace(limits, DEVICE)
    poison(workspace)
    flat, first = workspace.scores.view(-1), 0
    for scores in rows:
        flat[first : first + len(scores)] = scores
        first += -(-len(scores) // TILE) * TILE

    def ints(values):
        return torch.tensor(values, dtype=torch.int32, device=DEVICE)

    table = torch.stack([torch.randperm(max(lengths), device=DEVICE) for _ in rows]).to(torch.int32)
    described = SelectionRows(
        num_candidates=ints([len(scores) for scores in rows]),
        num_chosen=ints(budgets),
        tail_start=ints([n - NUM_LOCAL for n in lengths]),
        kv_end=ints(lengths),
        cached=ints([0] * len(rows)),
    )
    sizes = [NUM_SINK + budget + NUM_LOCAL for budget in budgets]
    kv_indptr = ints([0, *torch.tensor(sizes).cumsum(0).tolist()])
    kv_indices = torch.full((sum(sizes) + 9,), UNWRITTEN, dtype=torch.int32, device=DEVICE)
    for _ in range(2):  # the second call finds what the first one left
        take_scores(described, len(rows), workspace)
        emit(table, ints(range(len(rows))), described, len(rows), workspace, kv_indptr, kv_indices, num_sink=NUM_SINK)
    assert (kv_indices[sum(sizes) :] == UNWRITTEN).all()
    found = []
    for row, (start, end) in enumerate(zip(kv_indptr[:-1].tolist(), kv_indptr[1:].tolist(), strict=True)):
        positions = table[row].argsort()[kv_indices[start:end].long()].tolist()
        assert positions[:NUM_SINK] == list(range(NUM_SINK))
        assert positions[-NUM_LOCAL:] == list(range(lengths[row] - NUM_LOCAL, lengths[row]))
        found.append([p - NUM_SINK for p in positions[NUM_SINK:-NUM_LOCAL]])
    return found


def best(scores: torch.Tensor, budget: int) -> list[int]:
    return sorted(rank_candidates(scores, budget).tolist())


def spread(kind: str, count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    uniform = torch.rand(count, generator=generator, device=DEVICE)
    if kind == "many-octaves":
        return torch.exp(-60 * uniform)
    if kind == "narrow":
        return 1 + 1e-6 * uniform
    if kind == "ties":
        return (uniform * 4).floor() / 4
    if kind == "one-value":
        return torch.full((count,), 0.25, device=DEVICE)
    if kind == "zeros":
        return (uniform > 0.99).float() * uniform
    if kind == "subnormal":
        return uniform * 1e-40
    if kind == "one-hot-run":  # all that is chosen lies together
        return torch.where((torch.arange(count, device=DEVICE) - count // 2).abs() < 70, uniform + 1, uniform * 1e-3)
    raise ValueError(kind)


KINDS = ["many-octaves", "narrow", "ties", "one-value", "zeros", "subnormal", "one-hot-run"]


@pytest.mark.parametrize("count", [2, 63, 100, 111, 128, 129, 2000])
@pytest.mark.parametrize("kind", KINDS)
def test_all_kinds_of_scores(kind, count):
    scores = spread(kind, count)
    budgets = sorted({1, count // 2, min(count - 1, 128)})
    found = choose([scores] * len(budgets), budgets, max_budget=1024)
    assert found == [best(scores, budget) for budget in budgets]


@settings(deadline=None, max_examples=40 if DEVICE == "cpu" else 300)
@given(data=st.data())
def test_few_values_and_any_budget(data):
    values = st.sampled_from([0.0, 2.0**-149, 0.25, 0.25 + 2**-25, 1.0, 33.0])
    rows = [
        torch.tensor(scores, device=DEVICE)
        for scores in data.draw(st.lists(st.lists(values, min_size=2, max_size=300), min_size=1, max_size=3))
    ]
    budgets = [data.draw(st.integers(1, min(len(scores) - 1, 20))) for scores in rows]
    assert choose(rows, budgets, max_budget=20) == [best(*row) for row in zip(rows, budgets, strict=True)]


def test_scores_that_are_no_numbers_rank_first_and_break_nothing():
    scores = spread("many-octaves", 500)
    scores[[17, 401]] = torch.nan
    scores[300] = torch.inf
    (found,) = choose([scores], [5], max_budget=16)
    assert {17, 300, 401} < set(found) and len(set(found)) == 5


@BIG
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("counts", "max_budget"),
    [([131_072, 5_000, 2_049], 2048), ([1_048_576], 2048), ([32_768] * 64, 2048), ([131_072, 8_193], 8192)],
    ids=["ragged", "1M", "64-rows", "budget-8192"],
)
def test_large(kind, counts, max_budget):
    rows = [spread(kind, count, seed) for seed, count in enumerate(counts)]
    budgets = [min(max_budget, count - 1) - 7 * (row % 5) for row, count in enumerate(counts)]
    found = choose(rows, budgets, max_budget=max_budget)
    assert found == [best(*row) for row in zip(rows, budgets, strict=True)]
