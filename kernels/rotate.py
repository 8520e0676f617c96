# SPDX-License-Identifier: Apache-2.0
"""Rotary embedding of queries at positions of our choice, out of place: for votes and compact positions."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .checks import HALF_DTYPES, expect

MAX_BLOCK_HEADS = 16
"""Heads that a program rotates, at most."""


@triton.jit
def _rotate_kernel(
    x_ptr,
    positions_ptr,
    cos_sin_ptr,
    out_ptr,
    num_heads,
    stride_x_token,
    stride_x_head,
    stride_table_row,
    stride_out_token,
    stride_out_head,
    HALF_DIM: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
):
    pid_token = tl.program_id(0).to(tl.int64)
    pid_heads = tl.program_id(1)
    offs_d = tl.arange(0, HALF_DIM)
    # [BLOCK_HEADS, 1]
    offs_head = (pid_heads * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS))[:, None]
    mask_head = offs_head < num_heads

    cos_sin_ptr += tl.load(positions_ptr + pid_token).to(tl.int64) * stride_table_row
    cos = tl.load(cos_sin_ptr + offs_d)[None, :]
    sin = tl.load(cos_sin_ptr + HALF_DIM + offs_d)[None, :]
    # [BLOCK_HEADS, HALF_DIM]
    x_ptrs = x_ptr + pid_token * stride_x_token + offs_head * stride_x_head + offs_d[None, :]
    first = tl.load(x_ptrs, mask=mask_head, other=0.0).to(tl.float32)
    second = tl.load(x_ptrs + HALF_DIM, mask=mask_head, other=0.0).to(tl.float32)
    out_ptrs = out_ptr + pid_token * stride_out_token + offs_head * stride_out_head + offs_d[None, :]
    tl.store(out_ptrs, (first * cos - second * sin).to(out_ptr.dtype.element_ty), mask=mask_head)
    tl.store(out_ptrs + HALF_DIM, (second * cos + first * sin).to(out_ptr.dtype.element_ty), mask=mask_head)


def rotate(x: torch.Tensor, positions: torch.Tensor, cos_sin_cache: torch.Tensor, *, out: torch.Tensor) -> None:
    """Rotates each token to its position, halves paired (NeoX), in float32 and rounded once. No host sync.

    Args:
        x: [num_tokens, num_heads, head_dim] bfloat16 or float16, last dimension contiguous; head_dim a power of two.
        positions: [num_tokens] int32 or int64, rows of the table; not checked.
        cos_sin_cache: [max_position, head_dim] float32, cosines then sines, as in ``reference/positions.py``.
        out: [num_tokens, num_heads, head_dim], dtype of ``x``, last dimension contiguous, other memory than ``x``.

    Raises:
        ValueError: a dtype or shape is not as stated.
    """
    expect("x", x, (None, None, None), *HALF_DTYPES)
    num_tokens, num_heads, head_dim = x.shape
    if head_dim < 2 or head_dim & (head_dim - 1):
        raise ValueError(f"x: expected head_dim to be a power of two from 2 on, got {head_dim}")
    expect("positions", positions, (num_tokens,), torch.int32, torch.int64)
    expect("cos_sin_cache", cos_sin_cache, (None, head_dim), torch.float32)
    expect("out", out, x.shape, x.dtype)
    if not x.numel():
        return
    block_heads = min(triton.next_power_of_2(num_heads), MAX_BLOCK_HEADS)
    _rotate_kernel[(num_tokens, triton.cdiv(num_heads, block_heads))](
        x,
        positions,
        cos_sin_cache,
        out,
        num_heads,
        x.stride(0),
        x.stride(1),
        cos_sin_cache.stride(0),
        out.stride(0),
        out.stride(1),
        HALF_DIM=head_dim // 2,
        BLOCK_HEADS=block_heads,
        num_warps=4,
    )
