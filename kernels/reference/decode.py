# SPDX-License-Identifier: Apache-2.0
"""Selection for one decode query (spec, "Selection for one decode query"; paper, section 3.2)."""

from __future__ import annotations

import torch

from .kv import RequestKV
from .positions import Rope
from .vote import Score, rank_candidates, soft_vote
from .window import Window


def select_for_query(
    query: torch.Tensor,
    kv: RequestKV,
    window: Window,
    *,
    rope: Rope | None = None,
    vote_scale: float = 1.0,
    score: Score = soft_vote,
) -> torch.Tensor:
    """Positions voted for by the last query of a request longer than the window.

    Args:
        query: [num_qo_heads, head_dim]; rotated already if ``rope`` is None.
        rope: given in compact mode: the query is scored at position num_local against un-rotated keys.

    Returns:
        [budget] int64, best first.
    """
    if len(kv) <= window.size:
        raise ValueError(f"seq_len: expected more than the window of {window.size} tokens, got {len(kv)}")
    query = query.unsqueeze(0)
    if rope is not None:
        query = rope.rotate(query, torch.tensor([window.num_local], device=query.device))
    candidates = kv.keys(slice(window.num_sink, len(kv) - window.num_local))
    return window.num_sink + rank_candidates(score(query, candidates, vote_scale=vote_scale)[0], window.budget)
