# SPDX-License-Identifier: Apache-2.0
"""The keys of one layer in a paged pool, and which of its slots belong to whom."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .checks import HALF_DTYPES

KEY_DTYPES = (*HALF_DTYPES, torch.float8_e4m3fn)
LOG2_E = 1.4426950408889634
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
        pool, table = self.pool, self.req_to_token
        if pool.dtype not in KEY_DTYPES:
            raise ValueError(f"pool.dtype: expected one of {[str(d) for d in KEY_DTYPES]}, got {pool.dtype}")
        if pool.dim() != 3 or pool.shape[2] not in HEAD_DIMS:
            raise ValueError(f"pool: expected [num_slots, num_kv_heads, head_dim in {HEAD_DIMS}], got {[*pool.shape]}")
        if pool.stride()[1:] != (pool.shape[2], 1):
            raise ValueError(f"pool.stride(): expected contiguous heads, got {pool.stride()}")
        if table.dtype != torch.int32 or table.dim() != 2 or table.stride(1) != 1:
            raise ValueError(f"req_to_token: expected int32 rows, got {table.dtype} with strides {table.stride()}")

    @property
    def query_dtypes(self) -> tuple[torch.dtype, ...]:
        """What queries may be: as the keys are, or any half type beside float8 keys, which are converted to it."""
        return (self.pool.dtype,) if self.pool.dtype in HALF_DTYPES else HALF_DTYPES

    def logit_scale(self, vote_scale: float) -> float:
        """What a dot with a stored key is multiplied by, so that ``exp2`` of it is ``exp`` of the logit."""
        return vote_scale * self.k_scale * LOG2_E

    @property
    def num_kv_heads(self) -> int:
        return self.pool.shape[1]

    @property
    def head_dim(self) -> int:
        return self.pool.shape[2]
