# SPDX-License-Identifier: Apache-2.0
"""Rotation at given positions against the float64 reference: Triton's interpreter without a GPU, native with one."""

from __future__ import annotations

import pytest
import torch
from accelerator import DEVICE, NEEDS_CUDA

from sglang_tokenselect.kernels.reference.positions import Rope
from sglang_tokenselect.kernels.rotate import rotate

THETA, MAX_POSITION = 1e6, 9000
HALVES = [torch.float16, pytest.param(torch.bfloat16, marks=NEEDS_CUDA)]


def table(head_dim: int, *, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return Rope.from_theta(THETA, head_dim, MAX_POSITION, dtype=dtype).cos_sin_cache.to(DEVICE)


def tokens(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)


def positions_of(count: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """Anywhere, in no order, the last position of the table among them."""
    positions = torch.randint(MAX_POSITION, (count,), generator=torch.Generator().manual_seed(2))
    positions[-1] = MAX_POSITION - 1
    return positions.to(DEVICE, dtype)


def check(out: torch.Tensor, x: torch.Tensor, positions: torch.Tensor) -> None:
    """Raises unless ``out`` is the exact rotation, rounded once."""
    exact = Rope(table(x.shape[2], dtype=torch.float64)).rotate(x.double(), positions.long())
    error = (out.double() - exact).abs()
    assert (error <= 0.5 * torch.finfo(x.dtype).eps * exact.abs() + 2e-6).all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(("num_tokens", "num_heads"), [(1, 1), (1, 32), (7, 14), (3, 17), (130, 7)])
def test_rotation(num_tokens, num_heads, head_dim, dtype):
    """One token, odd numbers of tokens, heads that fill no block and more than one; from poisoned memory."""
    x, positions = tokens(num_tokens, num_heads, head_dim, dtype=dtype), positions_of(num_tokens)
    out = torch.full_like(x, torch.nan)
    rotate(x, positions, table(head_dim), out=out)
    check(out, x, positions)


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
def test_strided_tensors(index_dtype):
    """Queries that are a slice of a projection's output, a table and an output that are slices too."""
    wide = torch.full((11, 9, 192), torch.nan, dtype=torch.float16, device=DEVICE)
    x, positions = wide[2:10:2, 1:8, 32:96], positions_of(4, index_dtype)
    x.copy_(tokens(4, 7, 64))
    wide_out = torch.full((5, 8, 96), torch.nan, dtype=torch.float16, device=DEVICE)
    wide_table = torch.cat([table(64), torch.full((MAX_POSITION, 3), torch.nan, device=DEVICE)], dim=1)
    out = wide_out[1:, :7, 16:80]
    rotate(x, positions, wide_table[:, :64], out=out)
    check(out, x, positions)
    assert wide_out.isfinite().sum() == out.numel(), "written outside of the output"


def test_position_0_changes_nothing():
    x = tokens(5, 3, 64)
    out = torch.full_like(x, torch.nan)
    rotate(x, torch.zeros(5, dtype=torch.int32, device=DEVICE), table(64), out=out)
    assert torch.equal(out, x)


def test_smallest_head_and_no_tokens():
    x, positions = tokens(3, 5, 2), positions_of(3)
    out = torch.full_like(x, torch.nan)
    rotate(x, positions, table(2), out=out)
    check(out, x, positions)
    rotate(x[:0], positions[:0], table(2), out=out[:0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": tokens(4, 3, 64).float()}, "x: expected dtype torch.bfloat16 or torch.float16, got torch.float32"),
        ({"x": tokens(4, 192)}, r"x: expected shape \['any', 'any', 'any'\], got \[4, 192\]"),
        ({"x": tokens(4, 3, 64, 2)[..., 0]}, "x: expected a contiguous last dimension, got stride 2"),
        ({"x": tokens(4, 3, 96)}, "x: expected head_dim to be a power of two from 2 on, got 96"),
        ({"positions": positions_of(3)}, r"positions: expected shape \[4\], got \[3\]"),
        (
            {"positions": positions_of(4).short()},
            "positions: expected dtype torch.int32 or torch.int64, got torch.int16",
        ),
        ({"cos_sin_cache": table(128)}, r"cos_sin_cache: expected shape \['any', 64\], got \[9000, 128\]"),
        ({"cos_sin_cache": table(64).half()}, "cos_sin_cache: expected dtype torch.float32, got torch.float16"),
        ({"out": tokens(4, 2, 64)}, r"out: expected shape \[4, 3, 64\], got \[4, 2, 64\]"),
        ({"out": tokens(4, 3, 64, dtype=torch.bfloat16)}, "out: expected dtype torch.float16, got torch.bfloat16"),
    ],
)
def test_refusals(changes, message):
    arguments = {"x": tokens(4, 3, 64), "positions": positions_of(4), "cos_sin_cache": table(64)}
    with pytest.raises(ValueError, match=message):
        rotate(**({**arguments, "out": tokens(4, 3, 64)} | changes))
