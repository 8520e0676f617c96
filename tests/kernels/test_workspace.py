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


def parts_of_rows(limits: WorkspaceLimits, num_candidates: list[int]) -> dict[int, int]:
    """The part of each row with candidates, by laying out the tiles one by one. Raises if a part does not fit."""
    tiles = [row for row, count in enumerate(num_candidates) for _ in range(0, count, TILE)]
    parts = {row: tiles.index(row) // limits.part_tiles for row in set(tiles)}
    for row, part in parts.items():
        last = len(tiles) - tiles[::-1].index(row)
        assert last - part * limits.part_tiles <= limits.num_tiles
    return parts


@given(data=st.data())
def test_count_parts(data):
    """As many as the last row needs; rows that turn out to have no candidates stay within."""
    max_seq_len = data.draw(st.integers(1, 9 * TILE))
    counts = data.draw(st.lists(st.integers(0, max_seq_len), min_size=1, max_size=12))
    max_candidates = data.draw(st.integers(max_seq_len, 20 * TILE))
    limits = WorkspaceLimits(len(counts), max_candidates, max_seq_len, 64)
    num_parts = limits.count_parts(counts)
    assert num_parts == max(parts_of_rows(limits, counts).values(), default=0) + 1
    assert num_parts <= limits.num_parts(len(counts))

    hits = data.draw(st.lists(st.booleans(), min_size=len(counts), max_size=len(counts)))
    fewer = [0 if hit else count for hit, count in zip(hits, counts, strict=True)]
    assert all(part < num_parts for part in parts_of_rows(limits, fewer).values())
    assert limits.count_parts(fewer) <= num_parts


def test_no_candidates_need_one_part():
    limits = WorkspaceLimits(3, 100, 100, 64)
    assert limits.count_parts([]) == limits.count_parts([0, 0, 0]) == 1


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
