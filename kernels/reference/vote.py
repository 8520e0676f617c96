# SPDX-License-Identifier: Apache-2.0
"""The soft vote of the heads (TokenSelect, arXiv 2411.02886, section 3.2, Eq. 7) and its ranking."""

from __future__ import annotations

from typing import Literal, Protocol

import torch

VoteHeads = Literal["group", "modulo"]


class Score(Protocol):
    """Scores candidates, as `soft_vote` does: for its arguments and result see there."""

    def __call__(self, query: torch.Tensor, keys: torch.Tensor, *, vote_scale: float = 1.0) -> torch.Tensor: ...


def soft_vote(
    query: torch.Tensor, keys: torch.Tensor, *, vote_scale: float = 1.0, vote_heads: VoteHeads = "group"
) -> torch.Tensor:
    """Each head spreads one vote over the candidates by softmax; a candidate's score is the sum.

    Logits are *not* divided by sqrt(head_dim); ``vote_scale`` multiplies them.

    Args:
        query: [rows, num_qo_heads, head_dim].
        keys: [num_candidates, num_kv_heads, head_dim].
        vote_heads: "group" scores query head h against KV head h // group, which is the head that
            it attends with; "modulo" is the pairing of the paper's released code, for parity tests.

    Returns:
        [rows, num_candidates], float32, or float64 where the inputs are.
    """
    rows, num_qo_heads, head_dim = query.shape
    num_candidates, num_kv_heads, _ = keys.shape
    if num_qo_heads % num_kv_heads:
        raise ValueError(f"num_qo_heads: expected a multiple of num_kv_heads={num_kv_heads}, got {num_qo_heads}")
    group = num_qo_heads // num_kv_heads
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, keys = query.to(dtype), keys.to(dtype)
    if vote_heads == "modulo":
        query = query.view(rows, group, num_kv_heads, head_dim).transpose(1, 2)
    grouped = query.reshape(rows, num_kv_heads, group, head_dim).transpose(0, 1).flatten(1, 2)
    logits = torch.bmm(grouped, keys.permute(1, 2, 0)) * vote_scale
    votes = logits.softmax(-1).view(num_kv_heads, rows, group, num_candidates)
    return votes.sum((0, 2))


def rank_candidates(score: torch.Tensor, budget: int) -> torch.Tensor:
    """Indices of the ``budget`` highest scores, best first; equal scores in ascending index.

    Args:
        score: [num_candidates], num_candidates >= budget.

    Returns:
        [budget] int64.
    """
    lowest = score.topk(budget, sorted=False).values.min() if budget else score.new_tensor(torch.inf)
    # torch.topk breaks ties in no stated order: take all above the lowest, then the first of its equals.
    above = (score > lowest).nonzero().flatten()
    ties = (score == lowest).nonzero().flatten()[: budget - above.numel()]
    chosen = torch.cat([above, ties]).sort().values
    return chosen[score[chosen].sort(descending=True, stable=True).indices]
