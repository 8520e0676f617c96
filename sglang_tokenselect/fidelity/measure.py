# SPDX-License-Identifier: Apache-2.0
"""What a selection keeps of one query's dense attention, at several budgets: attention mass, recall, output error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from sglang_tokenselect.fidelity.head_group import AttentionRule, GroupAttention, attend_group
from sglang_tokenselect.kernels.reference.decode import select_for_query
from sglang_tokenselect.kernels.reference.kv import RequestKV
from sglang_tokenselect.kernels.reference.vote import Score, soft_vote
from sglang_tokenselect.kernels.reference.window import Window


@dataclass(frozen=True)
class Fidelity:
    """Each [num_budgets, num_qo_heads], float32, or float64 where the query is; NaN where it is not defined.

    Attributes:
        mass: share of the head's dense attention that the attended tokens hold.
        recall: of the `budget` candidates to which the head gives most of its dense attention, the share that was
            chosen; of all, if there are no more. Not defined for a budget of 0.
        error: distance of the head's output from its dense output, in lengths of the latter.
    """

    mass: torch.Tensor
    recall: torch.Tensor
    error: torch.Tensor

    @classmethod
    def undefined(cls, num_budgets: int, num_qo_heads: int) -> Fidelity:
        nan = torch.full((num_budgets, num_qo_heads), torch.nan)
        return cls(nan, nan, nan)


def measure_fidelity(
    query: torch.Tensor,
    kv: RequestKV,
    budgets: Sequence[int],
    rule: AttentionRule,
    *,
    num_sink: int,
    num_local: int,
    vote_scale: float = 1.0,
    score: Score = soft_vote,
) -> Fidelity:
    """One layer, by a vote of this very query.

    With compact positions dense attention is the model's own, keys at 0..n-1 and the query at n-1; what is attended to
    is renumbered. Memory: all keys once, widened, for the vote; then one KV head's keys and values, and its logits.

    Args:
        query: [num_qo_heads, head_dim]; un-rotated with compact positions.
        budgets: in any order.
        score: of the candidates.
    """
    num_candidates = max(len(kv) - num_sink - num_local, 0)
    cut = [budget for budget in budgets if budget < num_candidates]
    window = Window(num_sink, max(cut, default=0), num_local)
    ranked = torch.empty(0, dtype=torch.int64)
    if cut:
        ranked = select_for_query(query, kv, window, rope=rule.rope, vote_scale=vote_scale, score=score)
    num_kv_heads = kv.key_pool.shape[1]
    groups = [
        _measure_group(group, kv, kv_head, budgets, rule, window, ranked)
        for kv_head, group in enumerate(query.unflatten(0, (num_kv_heads, -1)))
    ]
    return Fidelity(*(torch.cat([getattr(g, field.name) for g in groups], dim=-1) for field in fields(Fidelity)))


def _measure_group(
    query: torch.Tensor,
    kv: RequestKV,
    kv_head: int,
    budgets: Sequence[int],
    rule: AttentionRule,
    window: Window,
    ranked: torch.Tensor,
) -> Fidelity:
    """
    Args:
        ranked: candidates for the largest of the budgets that leave some out, best first.
    """
    dense = attend_group(query, kv, kv_head, slice(None), rule)
    candidates = slice(window.num_sink, max(len(kv) - window.num_local, window.num_sink))
    # By logits, not probabilities: those may vanish, and then tie.
    best = window.num_sink + dense.logits[:, candidates].sort(descending=True, stable=True).indices
    rows = []
    for budget in budgets:
        if budget >= best.shape[1]:
            rows.append(_nothing_lost(dense, budget))
            continue
        positions = Window(window.num_sink, budget, window.num_local).positions(ranked, len(kv))
        is_attended = torch.zeros(len(kv), dtype=torch.bool, device=query.device)
        is_attended[positions] = True
        sparse = attend_group(query, kv, kv_head, positions, rule)
        rows.append(
            Fidelity(
                mass=dense.probabilities[:, positions].sum(-1),
                recall=is_attended[best[:, :budget]].to(dense.logits.dtype).mean(-1),
                error=(sparse.output - dense.output).norm(dim=-1) / dense.output.norm(dim=-1),
            )
        )
    return Fidelity(*(torch.stack([getattr(row, field.name) for row in rows]) for field in fields(Fidelity)))


def _nothing_lost(dense: GroupAttention, budget: int) -> Fidelity:
    one = torch.ones_like(dense.logits[:, 0])
    return Fidelity(mass=one, recall=one if budget else one * torch.nan, error=torch.zeros_like(one))
