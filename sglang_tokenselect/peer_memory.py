# SPDX-License-Identifier: Apache-2.0
"""Memory that the GPUs of a tensor parallel group reach on each other (PyTorch's symmetric memory, over NVLink)."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory

from sglang_tokenselect.kernels.vote_exchange import ExchangeLayout, VoteExchange


def open_exchange(group: dist.ProcessGroup, layout: ExchangeLayout, device: torch.device) -> VoteExchange:
    """Called by all ranks of an NCCL group at once; returns when all memories are zeros and reachable.

    Raises:
        RuntimeError: the GPUs do not reach each other's memory.
    """
    memory = symmetric_memory.empty(layout.num_words, dtype=torch.int64, device=device)
    memory.zero_()
    try:
        handle = symmetric_memory.rendezvous(memory, group.group_name)
    except RuntimeError as error:
        raise RuntimeError(
            "tokenselect: vote=global: expected GPUs that reach each other's memory (NVLink, or PCIe with peer "
            f"access), got: {error}; --tokenselect-vote local needs no such memory"
        ) from error
    torch.cuda.synchronize(device)
    dist.barrier(group, device_ids=[device.index])
    exchange = VoteExchange(handle.rank, layout, list(handle.buffer_ptrs), memory)
    exchange.handle = handle  # unmaps the others' memory when it goes
    return exchange
