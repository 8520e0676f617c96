# SPDX-License-Identifier: Apache-2.0
"""How much of a query's attention to the candidates falls on those that were chosen."""

from __future__ import annotations

import torch

# Candidates per step: bounds the logits at 2 x num_qo_heads x CHUNK, beside the widened keys of as many.
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
    """Share of one query's attention to the candidates that the chosen ones hold. No host sync.

    Candidates are the positions [num_sink, n - num_local); no other keys are read. Float32 at least.

    Args:
        query: [num_qo_heads, head_dim], rotated as the keys are.
        key_pool: [num_slots, num_kv_heads, head_dim].
        slots: [n] int32 or int64, slot of each position, that of the query included.
        is_chosen: [n] bool, the positions attended to; those that are no candidates do not matter.
        scaling: factor of the logits, 1/sqrt(head_dim) in most models; with float8 keys, times their k_scale.
        logit_cap: tanh soft cap of the logits, 0 for none.
        chunk: candidates whose logits are held at once.

    Returns:
        [] float32, 0 to 1, the mean over heads; 1 if there are no candidates.

    Raises:
        ValueError: heads that do not divide.
    """
    end = slots.shape[0] - num_local
    if end <= num_sink:
        return query.new_ones((), dtype=torch.float32)
    query = query.to(torch.promote_types(query.dtype, torch.float32))
    # [2, num_qo_heads], natural logarithms: chosen and left are summed apart, so that no share exceeds 1.
    mass = query.new_full((2, query.shape[0]), -torch.inf)
    for start in range(num_sink, end, chunk):
        tokens = slice(start, min(start + chunk, end))
        logits = _logits(query, key_pool[slots[tokens]], scaling=scaling, logit_cap=logit_cap)
        masked = torch.stack([~is_chosen[tokens], is_chosen[tokens]]).unsqueeze(1)
        mass = torch.logaddexp(mass, logits.masked_fill(masked, -torch.inf).logsumexp(-1))
    chosen, left = mass
    return torch.sigmoid(chosen - left).mean().float()


def _logits(query: torch.Tensor, keys: torch.Tensor, *, scaling: float, logit_cap: float) -> torch.Tensor:
    """[num_qo_heads, num_keys] in the dtype of the query."""
    num_qo_heads, num_kv_heads = query.shape[0], keys.shape[1]
    if num_qo_heads % num_kv_heads:
        raise ValueError(f"num_qo_heads: expected a multiple of num_kv_heads={num_kv_heads}, got {num_qo_heads}")
    grouped = query.view(num_kv_heads, num_qo_heads // num_kv_heads, -1)
    # Scaled afterwards: what was bfloat16 or float16 stays exact, even where the product is made in TF32.
    logits = torch.bmm(grouped, keys.to(query.dtype).permute(1, 2, 0)).flatten(0, 1) * scaling
    return logit_cap * torch.tanh(logits / logit_cap) if logit_cap else logits
