# SPDX-License-Identifier: Apache-2.0
"""How much of a query's attention falls on the tokens that it attends to."""

from __future__ import annotations

import torch

# Tokens per step: bounds the logits at 4 x num_qo_heads x CHUNK, beside the widened keys of as many tokens.
CHUNK = 16384


def candidate_mass(
    query: torch.Tensor,
    key_pool: torch.Tensor,
    slots: torch.Tensor,
    is_chosen: torch.Tensor,
    *,
    num_sink: int,
    num_local: int,
    scaling: float,
    logit_cap: float = 0.0,
    chunk: int = CHUNK,
) -> torch.Tensor:
    """Shares of one query's attention over all of its tokens that those attended to hold. No host sync.

    Candidates are the positions [num_sink, n - num_local). A head's weight of a token is its softmax over all n,
    as the model's attention would have it, in float32 at least.

    Args:
        query: [num_qo_heads, head_dim], rotated as the keys are.
        key_pool: [num_slots, num_kv_heads, head_dim].
        slots: [n] int32 or int64, slot of each position, that of the query included; n is 1 at least.
        is_chosen: [n] bool, the positions attended to: sink, chosen and local.
        scaling: factor of the logits, 1/sqrt(head_dim) in most models; with float8 keys, times their k_scale.
        logit_cap: tanh soft cap of the logits, 0 for none.
        chunk: tokens whose logits are held at once.

    Returns:
        [2] float32, each a mean over heads, 0 to 1: the share of the candidates' mass that chosen candidates hold,
        1 if there are none; and the share of all tokens' mass that all chosen tokens hold.

    Raises:
        ValueError: heads that do not divide.
    """
    num_tokens, device = slots.shape[0], slots.device
    positions = torch.arange(num_tokens, device=device)
    is_candidate = (positions >= num_sink) & (positions < num_tokens - num_local)
    # [4, n]: each token in one. Mass is summed apart for those in and out, so that no share exceeds 1.
    kinds = torch.stack(
        [is_candidate & is_chosen, is_candidate & ~is_chosen, ~is_candidate & is_chosen, ~is_candidate & ~is_chosen]
    )
    query = query.to(torch.promote_types(query.dtype, torch.float32))
    # [4, num_qo_heads], natural logarithms.
    mass = query.new_full((4, query.shape[0]), -torch.inf)
    for start in range(0, num_tokens, chunk):
        tokens = slice(start, start + chunk)
        logits = _logits(query, key_pool[slots[tokens]], scaling=scaling, logit_cap=logit_cap)
        mass = torch.logaddexp(mass, logits.masked_fill(~kinds[:, None, tokens], -torch.inf).logsumexp(-1))
    chosen, left, window, outside = mass
    of_all = torch.sigmoid(torch.logaddexp(chosen, window) - torch.logaddexp(left, outside)).mean()
    has_candidates = num_sink < num_tokens - num_local
    of_candidates = torch.sigmoid(chosen - left).mean() if has_candidates else torch.ones_like(of_all)
    return torch.stack([of_candidates, of_all]).float()


def _logits(query: torch.Tensor, keys: torch.Tensor, *, scaling: float, logit_cap: float) -> torch.Tensor:
    """[num_qo_heads, num_keys] in the dtype of the query."""
    num_qo_heads, num_kv_heads = query.shape[0], keys.shape[1]
    if num_qo_heads % num_kv_heads:
        raise ValueError(f"num_qo_heads: expected a multiple of num_kv_heads={num_kv_heads}, got {num_qo_heads}")
    grouped = query.view(num_kv_heads, num_qo_heads // num_kv_heads, -1)
    # Scaled afterwards: what was bfloat16 or float16 stays exact, even where the product is made in TF32.
    logits = torch.bmm(grouped, keys.to(query.dtype).permute(1, 2, 0)).flatten(0, 1) * scaling
    return logit_cap * torch.tanh(logits / logit_cap) if logit_cap else logits
