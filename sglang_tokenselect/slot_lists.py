# SPDX-License-Identifier: Apache-2.0
"""What a selection is to the attention: lists of slots, one after the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class SlotLists:
    """One list of slots for each request (or block of queries) of a forward.

    Attributes:
        kv_indptr: [num_lists + 1] int32 on the device: where each list begins in `kv_indices`.
        kv_indptr_cpu: the same on the host.
        kv_indices: [>= kv_indptr[-1]] int32 on the device; the slots may be written after planning.
    """

    kv_indptr: torch.Tensor
    kv_indptr_cpu: torch.Tensor
    kv_indices: torch.Tensor

    def __len__(self) -> int:
        return self.kv_indptr_cpu.shape[0] - 1
