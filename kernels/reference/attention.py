# SPDX-License-Identifier: Apache-2.0
"""Exact attention of the last queries of a request over some of its tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from .kv import RequestKV
from .positions import Rope

# Queries per call: bounds the mask at QUERY_TILE x num_keys.
QUERY_TILE = 512


def attend_positions(
    query: torch.Tensor,
    kv: RequestKV,
    positions: torch.Tensor | slice,
    *,
    scaling: float,
    logit_cap: float = 0.0,
    rope: Rope | None = None,
) -> torch.Tensor:
    """Attention over ``positions``, whose last ``num_queries`` are the queries' own.

    Args:
        query: [num_queries, num_qo_heads, head_dim]; rotated already if ``rope`` is None.
        positions: [num_keys] int64 ascending, or a slice.
        scaling: factor of the logits, 1/sqrt(head_dim) in most models.
        logit_cap: tanh soft cap of the logits, 0 for none.
        rope: given in compact mode, where pool and queries are un-rotated: the keys get positions
            0..num_keys-1 and the queries the last of them.

    Returns:
        [num_queries, num_qo_heads, head_dim] in the dtype of the query.
    """
    keys, values = kv.keys(positions), kv.values(positions)
    num_queries, num_keys = query.shape[0], keys.shape[0]
    if rope is not None:
        compact = torch.arange(num_keys, device=query.device)
        keys = rope.rotate(keys, compact)
        query = rope.rotate(query, compact[num_keys - num_queries :])
    keys, values = keys.to(query.dtype), values.to(query.dtype)
    return _attend_causal(query, keys, values, scaling=scaling, logit_cap=logit_cap)


def _attend_causal(query, keys, values, *, scaling: float, logit_cap: float) -> torch.Tensor:
    num_queries, num_keys = query.shape[0], keys.shape[0]
    first_key = num_keys - num_queries
    if num_queries == num_keys and not logit_cap:
        return _sdpa(query, keys, values, scaling=scaling, is_causal=True)
    out = torch.empty_like(query)
    for lo in range(0, num_queries, QUERY_TILE):
        hi = min(lo + QUERY_TILE, num_queries)
        end = first_key + hi
        tile = query[lo:hi], keys[:end], values[:end]
        mask = None if hi - lo == 1 else query.new_ones(hi - lo, end, dtype=torch.bool).tril(first_key + lo)
        if logit_cap:
            out[lo:hi] = _attend_capped(*tile, mask, scaling=scaling, logit_cap=logit_cap)
        else:
            out[lo:hi] = _sdpa(*tile, scaling=scaling, attn_mask=mask)
    return out


def _sdpa(query, keys, values, *, scaling: float, **masking) -> torch.Tensor:
    heads_first = (x.transpose(0, 1).unsqueeze(0) for x in (query, keys, values))
    gqa = query.shape[1] != keys.shape[1]
    out = F.scaled_dot_product_attention(*heads_first, scale=scaling, enable_gqa=gqa, **masking)
    return out.squeeze(0).transpose(0, 1)


def _attend_capped(query, keys, values, mask, *, scaling: float, logit_cap: float) -> torch.Tensor:
    group = query.shape[1] // keys.shape[1]
    dtype = torch.promote_types(query.dtype, torch.float32)
    keys, values = (x.to(dtype).repeat_interleave(group, dim=1) for x in (keys, values))
    logits = torch.einsum("qhd,khd->hqk", query.to(dtype), keys) * scaling
    logits = logit_cap * torch.tanh(logits / logit_cap)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    return torch.einsum("hqk,khd->qhd", logits.softmax(-1), values).to(query.dtype)
