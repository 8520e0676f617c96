# SPDX-License-Identifier: Apache-2.0
"""What a decode row attended to, read back from its entry of the selection cache after the step."""

from __future__ import annotations

import torch

from .selection_cache import SelectionCache

LOW_BITS = 2**31 - 1
"""A vote key's lower half is this less the candidate (`vote_keys.py`)."""


def attended_positions(
    cache: SelectionCache, slot: int, seq_len: int, budget: int, *, num_sink: int, num_local: int
) -> torch.Tensor:
    """Positions that the row of an entry attended to in the step that ended last. No host sync.

    Such a row voted in that step or reused a vote; its entry tells which by its age. An entry that holds no such vote
    gives positions of no meaning, none of them out of bounds.

    Args:
        cache: of one layer, as that step left it.
        slot: entry of the row; a row without one leaves no trace.
        seq_len: cached tokens in that step, that of the step included.
        budget: of the row in that step. With -1, or if all tokens fit the window, the row attended to everything
            and its entry is not looked at.

    Returns:
        [seq_len] bool, on the device of the cache.

    Raises:
        ValueError: a slot that is none of the cache's.
    """
    num_slots = cache.seq_len.shape[0]
    if not 0 <= slot < num_slots:
        raise ValueError(f"slot: expected 0 to {num_slots - 1}, got {slot}")
    if budget < 0 or seq_len <= num_sink + budget + num_local:
        return torch.ones(seq_len, dtype=torch.bool, device=cache.vote.device)
    age = seq_len - cache.seq_len[slot]
    keys = cache.vote[slot]
    ranks = torch.arange(keys.shape[0], device=keys.device)
    best_first = torch.where(ranks < cache.vote_len[slot], keys, -1).sort(descending=True).values
    candidates = LOW_BITS - (best_first & LOW_BITS)
    # What is no member goes behind the end.
    is_member = (ranks < budget - age) & (best_first >= 0)
    members = torch.where(is_member, num_sink + candidates, seq_len).clamp(max=seq_len)
    attended = torch.zeros(seq_len + 1, dtype=torch.bool, device=keys.device).index_fill_(0, members, True)[:seq_len]
    positions = torch.arange(seq_len, device=keys.device)
    return attended | (positions < num_sink) | (positions >= seq_len - num_local - age)
