# SPDX-License-Identifier: Apache-2.0
"""One request's keys and values of one layer, addressed by position in the request."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class RequestKV:
    """A view of a paged pool with page size 1.

    Attributes:
        key_pool: [num_slots, num_kv_heads, head_dim].
        value_pool: [num_slots, num_kv_heads, head_dim].
        slots: [seq_len] integer, the slot of each position, those of this forward included.
    """

    key_pool: torch.Tensor
    value_pool: torch.Tensor
    slots: torch.Tensor

    def __len__(self) -> int:
        return self.slots.shape[0]

    def keys(self, positions: torch.Tensor | slice) -> torch.Tensor:
        """[len(positions), num_kv_heads, head_dim], in the order of ``positions``."""
        return self.key_pool[self.slots[positions]]

    def values(self, positions: torch.Tensor | slice) -> torch.Tensor:
        """[len(positions), num_kv_heads, head_dim], in the order of ``positions``."""
        return self.value_pool[self.slots[positions]]
