# SPDX-License-Identifier: Apache-2.0
"""Parts of a batch that does not fit the scratch at once, and the scratch's bytes before it is allocated."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accelerator import DEVICE
from hypothesis import given
from hypothesis import strategies as st

from sglang_tokenselect.kernels.block_plan import BlockScratch
from sglang_tokenselect.kernels.rows import SelectionRows, rows_block
from sglang_tokenselect.kernels.workspace import TILE, DecodeWorkspace, Workspace, WorkspaceLimits, nbytes


@given(data=st.data())
def test_cut_rows(data):
    """All rows once and in order; what a run holds fits, also if some of its rows reuse a vote; no run in vain."""
    max_seq_len = data.draw(st.integers(1, 9 * TILE))
    counts = data.draw(st.lists(st.integers(0, max_seq_len), min_size=1, max_size=12))
    shared = [data.draw(st.integers(0, count // TILE)) for count in counts]
    limits = WorkspaceLimits(1, data.draw(st.integers(max_seq_len, 30 * TILE)), max_seq_len, 64)
    own = data.draw(st.integers(max_seq_len, limits.max_candidates))
    workspace = DecodeWorkspace(limits, 2, 1, "meta", max_own_candidates=own)
    runs = workspace.cut_rows(counts, shared)
    assert [row for run in runs for row in run] == list(range(len(counts)))

    def fits(rows: range) -> bool:
        tiles = sum(-(-counts[row] // TILE) for row in rows)
        terms = workspace.terms.shape[0]
        return tiles <= workspace.scores.shape[0] and tiles - sum(shared[row] for row in rows) <= terms

    assert all(fits(run) and len(run) for run in runs)
    assert not any(fits(range(run.start, run.stop + 1)) for run in runs[:-1])


def test_rows_that_share_nothing():
    workspace = DecodeWorkspace(WorkspaceLimits(3, 300, 100, 64), 2, 1, "meta")
    assert workspace.cut_rows([0, 0, 0]) == workspace.cut_rows([100, 100, 100]) == [range(3)]


def test_blocks_of_rows():
    assert [rows_block(n) for n in (1, 16, 17, 256, 257, 4096, 4097)] == [16, 16, 256, 256, 4096, 4096, 8192]


LIMITS = WorkspaceLimits(max_rows=5, max_candidates=1000, max_seq_len=700, max_budget=40)
MAKERS = {
    "top-k": lambda device: Workspace(LIMITS, device),
    "decode": lambda device: DecodeWorkspace(LIMITS, 14, 2, device),
    "blocks": lambda device: BlockScratch.allocate(40, 14, device),
    "rows": lambda device: SelectionRows.empty(5, device),
}


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS.keys())
def test_bytes_are_known_beforehand(maker):
    made, promised = maker(DEVICE), maker("meta")
    tensors = [value for value in vars(made).values() if isinstance(value, torch.Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    assert nbytes(promised) == nbytes(made) == sum(storages.values()) > 0
    assert all(value.is_meta for value in vars(promised).values() if isinstance(value, torch.Tensor))


def test_bytes_of_what_holds_others():
    """Attributes of attributes and tuples of them; views of one memory count once."""
    tensor = torch.empty(6, 4, dtype=torch.float16, device="meta")
    rows = SelectionRows.empty(5, "meta")
    holder = SimpleNamespace(rows=rows, views=(tensor[0], SimpleNamespace(view=tensor[1:, 2])), tensor=tensor, size=7)
    assert nbytes(holder) == 6 * 4 * 2 + 5 * 5 * 4
