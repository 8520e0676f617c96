# SPDX-License-Identifier: Apache-2.0
"""Attention of one query in the heads that share a KV head, probabilities included.

One KV head at a time, so that no more than its own keys and values are widened and held.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_tokenselect.kernels.reference.kv import RequestKV
from sglang_tokenselect.kernels.reference.positions import Rope


@dataclass(frozen=True)
class AttentionRule:
    """How a layer attends.

    Attributes:
        scaling: factor of the logits.
        logit_cap: tanh soft cap of the logits, 0 for none.
        rope: with compact positions, where pool and queries are un-rotated: attended keys get positions 0..t-1, the
            query t-1. None: they are rotated already.
    """

    scaling: float
    logit_cap: float = 0.0
    rope: Rope | None = None


@dataclass(frozen=True)
class GroupAttention:
    """Float32, or float64 where the query is.

    Attributes:
        logits: [group, t], scaled and capped.
        probabilities: [group, t].
        output: [group, head_dim].
    """

    logits: torch.Tensor
    probabilities: torch.Tensor
    output: torch.Tensor


def attend_group(
    query: torch.Tensor, kv: RequestKV, kv_head: int, positions: torch.Tensor | slice, rule: AttentionRule
) -> GroupAttention:
    """
    Args:
        query: [group, head_dim], of the heads that read `kv_head`.
        positions: [t] int64 ascending, or a slice; the last is the query's own.
    """
    query = query.to(torch.promote_types(query.dtype, torch.float32))
    kv = kv.of_head(kv_head)
    keys, values = (x.squeeze(1).to(query.dtype) for x in (kv.keys(positions), kv.values(positions)))
    if rule.rope is not None:
        compact = torch.arange(len(keys), device=keys.device)
        keys = rule.rope.rotate(keys.unsqueeze(1), compact).squeeze(1)
        query = rule.rope.rotate(query.unsqueeze(0), compact[-1:]).squeeze(0)
    logits = query @ keys.T * rule.scaling
    if rule.logit_cap:
        logits = rule.logit_cap * torch.tanh(logits / rule.logit_cap)
    probabilities = logits.softmax(-1)
    return GroupAttention(logits, probabilities, probabilities @ values)


def largest_weights(query: torch.Tensor, kv: RequestKV, positions: torch.Tensor, rule: AttentionRule) -> torch.Tensor:
    """Of each attended token the largest probability that any head gives it.

    Args:
        query: [num_qo_heads, head_dim].
        positions: [t] int64 ascending.

    Returns:
        [t].
    """
    groups = query.unflatten(0, (kv.key_pool.shape[1], -1))
    weights = [attend_group(q, kv, head, positions, rule).probabilities.amax(0) for head, q in enumerate(groups)]
    return torch.stack(weights).amax(0)
