# SPDX-License-Identifier: Apache-2.0
"""The keys of one layer in a paged pool, and which of its slots belong to whom."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .checks import HALF_DTYPES, expect

KEY_DTYPES = (*HALF_DTYPES, torch.float8_e4m3fn)
HEAD_DIMS = (64, 128)


@dataclass(frozen=True)
class PagedKeys:
    """Keys of one layer, page size 1.

    Attributes:
        pool: [num_slots, num_kv_heads, head_dim] bfloat16, float16 or float8_e4m3fn; the last two
            dimensions contiguous; head_dim 64 or 128.
        req_to_token: [num_req_rows, max_context_len] int32, the slot of each position of each row;
            slots need not be ordered.
        k_scale: factor of the stored keys, for float8.

    Raises:
        ValueError: a dtype, shape or stride that the kernels do not serve.
    """

    pool: torch.Tensor
    req_to_token: torch.Tensor
    k_scale: float = 1.0

    def __post_init__(self) -> None:
        expect("pool", self.pool, (None, None, None), *KEY_DTYPES)
        if self.head_dim not in HEAD_DIMS:
            raise ValueError(f"pool: expected head_dim in {HEAD_DIMS}, got {self.head_dim}")
        if self.pool.stride(1) != self.head_dim:
            raise ValueError(f"pool: expected contiguous heads, got strides {self.pool.stride()}")
        expect("req_to_token", self.req_to_token, (None, None), torch.int32)

    @property
    def num_kv_heads(self) -> int:
        return self.pool.shape[1]

    @property
    def head_dim(self) -> int:
        return self.pool.shape[2]

    @property
    def query_dtypes(self) -> tuple[torch.dtype, ...]:
        """Dtypes that queries may have: the keys' own, or either half precision with float8 keys."""
        return (self.pool.dtype,) if self.pool.dtype in HALF_DTYPES else HALF_DTYPES
