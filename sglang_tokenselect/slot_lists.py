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

    def write_first_slots(self, req_to_token: torch.Tensor, rows: torch.Tensor, lengths: torch.Tensor) -> None:
        """Writes slots of positions 0..lengths-1 to each list, for those that attend to everything.

        Args:
            req_to_token: [num_req_rows, max_context_len] int32.
            rows: [num_lists] int64, row of `req_to_token` of each list.
            lengths: [num_lists] int32.
        """
        from sglang.kernels.ops.kvcache.kv_indices import create_flashinfer_kv_indices_triton  # not in 0.5.23

        create_flashinfer_kv_indices_triton[(len(self),)](
            req_to_token, rows, lengths, self.kv_indptr, None, self.kv_indices, req_to_token.stride(0)
        )
