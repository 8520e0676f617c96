# SPDX-License-Identifier: Apache-2.0
"""Selection for the blocks of a prefill (spec, "Selection in prefill"; paper, section 3.4)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F

from .positions import Rope
from .vote import Score, rank_candidates, soft_vote
from .window import Window

Combine = Literal["max", "sum"]


def cut_blocks(start: int, end: int, block: int) -> Iterator[tuple[int, int]]:
    """Cuts positions [start, end) at absolute multiples of ``block``, so that the cuts do not
    depend on the chunk that a prefill comes in."""
    while start < end:
        stop = min(end, (start // block + 1) * block)
        yield start, stop
        start = stop


def first_sparse_position(start: int, end: int, block: int, window: Window) -> int:
    """Start of the first block of [start, end) that selects; those before it are dense. ``end`` if none."""
    return next((lo for lo, _ in cut_blocks(start, end, block) if lo > window.dense_len), end)


def mean_queries(query: torch.Tensor, start: int, sub_block: int) -> torch.Tensor:
    """Mean query of each sub-block; sub-blocks are cut at absolute multiples of ``sub_block``.

    Args:
        query: [num_queries, num_qo_heads, head_dim], the first at position ``start``.

    Returns:
        [num_sub_blocks, num_qo_heads, head_dim], at least float32.
    """
    query = query.to(torch.promote_types(query.dtype, torch.float32))
    # The first and the last sub-block are filled up with zeros.
    front, back = start % sub_block, -(start + query.shape[0]) % sub_block
    sums = F.pad(query, (0, 0, 0, 0, front, back)).unflatten(0, (-1, sub_block)).sum(1)
    sizes = torch.full((sums.shape[0], 1, 1), sub_block, dtype=query.dtype, device=query.device)
    sizes[0] -= front
    sizes[-1] -= back
    return sums / sizes


def select_for_block(
    query: torch.Tensor,
    candidates: torch.Tensor,
    start: int,
    window: Window,
    *,
    sub_block: int,
    combine: Combine = "max",
    rope: Rope | None = None,
    vote_scale: float = 1.0,
    score: Score = soft_vote,
) -> torch.Tensor:
    """Positions voted for by the queries of the block that begins at ``start``.

    Args:
        query: [block_len, num_qo_heads, head_dim]; rotated already if ``rope`` is None.
        candidates: [>= start - num_local - num_sink, num_kv_heads, head_dim], keys of the request
            from position num_sink on.
        combine: how the votes of the sub-blocks become one score.
        rope: given in compact mode: query r is scored at position num_local + r.

    Returns:
        [budget] int64, best first.
    """
    if start <= window.size:
        raise ValueError(f"start: expected more than the window of {window.size} tokens, got {start}")
    if rope is not None:
        query = rope.rotate(query, window.num_local + torch.arange(query.shape[0], device=query.device))
    candidates = candidates[: start - window.num_local - window.num_sink]
    votes = score(mean_queries(query, start, sub_block), candidates, vote_scale=vote_scale)
    combined = votes.amax(0) if combine == "max" else votes.sum(0)
    return window.num_sink + rank_candidates(combined, window.budget)
