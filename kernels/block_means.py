# SPDX-License-Identifier: Apache-2.0
"""Mean queries of a prefill's sub-blocks, which cast the votes (TokenSelect, arXiv 2411.02886, section 3.4)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .checks import HALF_DTYPES, expect


@triton.jit
def _mean_queries_kernel(
    query_ptr,
    first_query_ptr,
    num_queries_ptr,
    start_ptr,
    out_ptr,
    sub_block,
    stride_query_token,
    stride_query_head,
    stride_out_row,
    stride_out_head,
    ROWS_PER_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    pid_row = tl.program_id(0).to(tl.int64)
    pid_head = tl.program_id(1).to(tl.int64)
    block = pid_row // ROWS_PER_BLOCK
    start = tl.load(start_ptr + block)
    first_query = tl.load(first_query_ptr + block).to(tl.int64)
    # The sub-block's queries, counted from the block's first.
    begin = (start // sub_block + (pid_row % ROWS_PER_BLOCK).to(tl.int32)) * sub_block - start
    end = tl.minimum(begin + sub_block, tl.load(num_queries_ptr + block))
    begin = tl.maximum(begin, 0)

    offs_q = tl.arange(0, BLOCK_Q)
    offs_d = tl.arange(0, HEAD_DIM)
    query_ptr += first_query * stride_query_token + pid_head * stride_query_head
    # [BLOCK_Q, HEAD_DIM]
    total = tl.zeros([BLOCK_Q, HEAD_DIM], dtype=tl.float32)
    for q in range(begin, end, BLOCK_Q):
        token = (q + offs_q).to(tl.int64)
        query_ptrs = query_ptr + token[:, None] * stride_query_token + offs_d[None, :]
        total += tl.load(query_ptrs, mask=token[:, None] < end, other=0.0).to(tl.float32)
    mean = tl.sum(total, axis=0) / tl.maximum(end - begin, 1).to(tl.float32)
    out_ptr += pid_row * stride_out_row + pid_head * stride_out_head
    tl.store(out_ptr + offs_d, mean.to(out_ptr.dtype.element_ty))


def mean_queries(
    query: torch.Tensor,
    first_query: torch.Tensor,
    num_queries: torch.Tensor,
    start: torch.Tensor,
    *,
    sub_block: int,
    rows_per_block: int,
    out: torch.Tensor,
) -> None:
    """Means of the queries of each sub-block, taken in float32 and rounded once to ``out``'s dtype.

    Sub-blocks are cut at absolute multiples of ``sub_block``, so a block that starts or ends inside one has a
    mean of the queries that are there. Row i of a block is its i-th sub-block; the rows left over are zeros.

    Args:
        query: [num_tokens, num_qo_heads, head_dim] bf16 or fp16, last dimension contiguous.
        first_query: [num_blocks >= 1] int32, where in ``query`` each block begins.
        num_queries: [num_blocks] int32, queries of each block.
        start: [num_blocks] int32, position of each block's first query in its request.
        sub_block: tokens.
        rows_per_block: rows of ``out`` for each block, at least the sub-blocks that it touches.
        out: [num_blocks * rows_per_block, num_qo_heads, head_dim] bf16 or fp16; every row is written.

    Raises:
        ValueError: a dtype, shape or size is not as stated.
    """
    num_blocks = first_query.shape[0]
    expect("query", query, (None, None, None), *HALF_DTYPES)
    _, num_qo_heads, head_dim = query.shape
    for name, tensor in (("first_query", first_query), ("num_queries", num_queries), ("start", start)):
        expect(name, tensor, (num_blocks,), torch.int32)
    expect("out", out, (num_blocks * rows_per_block, num_qo_heads, head_dim), *HALF_DTYPES)
    if head_dim & (head_dim - 1):
        raise ValueError(f"query: expected head_dim to be a power of two, got {head_dim}")
    if sub_block < 1:
        raise ValueError(f"sub_block: expected at least 1, got {sub_block}")
    _mean_queries_kernel[(num_blocks * rows_per_block, num_qo_heads)](
        query,
        first_query,
        num_queries,
        start,
        out,
        sub_block,
        query.stride(0),
        query.stride(1),
        out.stride(0),
        out.stride(1),
        ROWS_PER_BLOCK=rows_per_block,
        HEAD_DIM=head_dim,
        BLOCK_Q=min(32, triton.next_power_of_2(sub_block)),
        num_warps=2,
    )
