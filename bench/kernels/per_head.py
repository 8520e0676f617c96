# SPDX-License-Identifier: Apache-2.0
"""Decode selection as the paper released it, written plainly: the baseline of our kernels.

One request per call. Each query head reads the keys of its KV head for itself, so a group of four reads
them four times; dot products are elementwise float32, without tensor cores; the logits of all heads go
through memory to PyTorch's softmax and top-k.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK_TOKENS = 64


@triton.jit
def _score_kernel(
    query_ptr,
    key_pool_ptr,
    slots_ptr,
    logits_ptr,
    num_candidates,
    stride_query_head,
    stride_key_slot,
    stride_key_head,
    stride_logits_head,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
):
    # Heads are the fast axis: those of a group run side by side, and L2 serves their repeated reads.
    pid_head = tl.program_id(0).to(tl.int64)
    pid_token = tl.program_id(1).to(tl.int64)

    # [BLOCK_TOKENS]
    offs_token = pid_token * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    mask_token = offs_token < num_candidates
    slots = tl.load(slots_ptr + offs_token, mask=mask_token, other=0).to(tl.int64)

    # [HEAD_DIM]
    offs_dim = tl.arange(0, HEAD_DIM)
    query = tl.load(query_ptr + pid_head * stride_query_head + offs_dim).to(tl.float32)

    # [BLOCK_TOKENS, HEAD_DIM]
    offs_key = slots[:, None] * stride_key_slot + (pid_head // GROUP) * stride_key_head + offs_dim[None, :]
    keys = tl.load(key_pool_ptr + offs_key, mask=mask_token[:, None], other=0.0).to(tl.float32)

    # [BLOCK_TOKENS]
    logits = tl.sum(keys * query[None, :], axis=1)
    tl.store(logits_ptr + pid_head * stride_logits_head + offs_token, logits, mask=mask_token)


def score_heads(query: torch.Tensor, key_pool: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """Logits of each query head over the keys in ``slots``, not divided by sqrt(head_dim).

    Args:
        query: [num_qo_heads, head_dim].
        key_pool: [num_slots, num_kv_heads, head_dim].
        slots: [num_candidates] integer.

    Returns:
        [num_qo_heads, num_candidates], in the query's dtype.
    """
    num_qo_heads, head_dim = query.shape
    num_candidates = slots.shape[0]
    logits = torch.empty(num_qo_heads, num_candidates, dtype=query.dtype, device=query.device)
    _score_kernel[(num_qo_heads, triton.cdiv(num_candidates, BLOCK_TOKENS))](
        query_ptr=query,
        key_pool_ptr=key_pool,
        slots_ptr=slots,
        logits_ptr=logits,
        num_candidates=num_candidates,
        stride_query_head=query.stride(0),
        stride_key_slot=key_pool.stride(0),
        stride_key_head=key_pool.stride(1),
        stride_logits_head=logits.stride(0),
        GROUP=num_qo_heads // key_pool.shape[1],
        HEAD_DIM=head_dim,
        BLOCK_TOKENS=BLOCK_TOKENS,
    )
    return logits


def per_head_select(
    query: torch.Tensor, key_pool: torch.Tensor, slots: torch.Tensor, *, num_sink: int, num_local: int, budget: int
) -> torch.Tensor:
    """Slots that one decode query attends to: sink, voted and local tokens, in ascending position.

    Args:
        query: [num_qo_heads, head_dim].
        key_pool: [num_slots, num_kv_heads, head_dim], head_dim a power of two.
        slots: [seq_len] integer, the slot of each position; seq_len >= num_sink + budget + num_local.

    Returns:
        [num_sink + budget + num_local], in the dtype of ``slots``. Equal scores are cut in no stated order.
    """
    local_start = slots.shape[0] - num_local
    candidates = slots[num_sink:local_start]
    votes = torch.softmax(score_heads(query, key_pool, candidates), dim=-1, dtype=torch.float32)
    voted = torch.topk(votes.sum(0), budget, sorted=False).indices.sort().values
    return torch.cat([slots[:num_sink], candidates[voted], slots[local_start:]])
