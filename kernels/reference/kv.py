# SPDX-License-Identifier: Apache-2.0
"""One request's keys and values of one layer, addressed by position in the request."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class RequestKV:
    """A view of a paged pool with page size 1.

    Attributes:
        key_pool: [num_slots, num_kv_heads, head_dim].
        value_pool: [num_slots, num_kv_heads, head_dim].
        slots: [seq_len] integer, the slot of each position, those of this forward included.
        k_scale, v_scale: factors of the stored keys and values.
    """

    key_pool: torch.Tensor
    value_pool: torch.Tensor
    slots: torch.Tensor
    k_scale: float = 1.0
    v_scale: float = 1.0

    def __len__(self) -> int:
        return self.slots.shape[0]

    def keys(self, positions: torch.Tensor | slice) -> torch.Tensor:
        """[len(positions), num_kv_heads, head_dim], in the order of ``positions``; of a float8 pool in float32."""
        return _read(self.key_pool, self.slots[positions], self.k_scale)

    def values(self, positions: torch.Tensor | slice) -> torch.Tensor:
        """As `keys`."""
        return _read(self.value_pool, self.slots[positions], self.v_scale)

    def of_head(self, kv_head: int) -> RequestKV:
        """The same of one KV head alone, without a copy."""
        head = slice(kv_head, kv_head + 1)
        return replace(self, key_pool=self.key_pool[:, head], value_pool=self.value_pool[:, head])


def _read(pool: torch.Tensor, slots: torch.Tensor, scale: float) -> torch.Tensor:
    stored = pool[slots]
    if stored.dtype == torch.float8_e4m3fn:  # which has no arithmetic
        stored = stored.float()
    return stored if scale == 1.0 else stored * scale
