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

    Such a row voted in that step or reused a vote; its entry tells which by its age. An entry that
    :func:`entry_serves` denies gives positions of no meaning.

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
    _check_slot(cache, slot)
    if _attends_to_everything(seq_len, budget, num_sink, num_local):
        return torch.ones(seq_len, dtype=torch.bool, device=cache.vote.device)
    age = _age(cache, slot, seq_len)
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


def entry_serves(
    cache: SelectionCache, slot: int, seq_len: int, budget: int, *, num_sink: int, num_local: int
) -> torch.Tensor:
    """[] bool on the device: whether the entry has a vote that a row of that length and budget can have attended to.

    It does right after a step in which that row had this entry. It does not once the entry ended, or holds the vote
    of a later step, or one too old or too small; an entry that went to a request of much the same length looks as
    good as its own. For the arguments see :func:`attended_positions`.
    """
    _check_slot(cache, slot)
    if _attends_to_everything(seq_len, budget, num_sink, num_local):
        return torch.ones((), dtype=torch.bool, device=cache.vote.device)
    age = _age(cache, slot, seq_len)
    # No vote has length 0, which makes it older than any budget of a row that selects.
    return (age >= 0) & (age <= budget) & (budget - age <= cache.vote_len[slot])


def _check_slot(cache: SelectionCache, slot: int) -> None:
    num_slots = cache.seq_len.shape[0]
    if not 0 <= slot < num_slots:
        raise ValueError(f"slot: expected 0 to {num_slots - 1}, got {slot}")


def _attends_to_everything(seq_len: int, budget: int, num_sink: int, num_local: int) -> bool:
    return budget < 0 or seq_len <= num_sink + budget + num_local


def _age(cache: SelectionCache, slot: int, seq_len: int) -> torch.Tensor:
    """[] int32, tokens that came since the vote of an entry."""
    return seq_len - cache.seq_len[slot]
