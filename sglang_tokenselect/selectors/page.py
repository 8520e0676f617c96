# SPDX-License-Identifier: Apache-2.0
"""Whole pages of 16 tokens, by an upper bound of their logits (Quest, arXiv 2406.10774).

What Quest is here: its bound of a page is the largest logit that any key between the page's smallest and largest values
could have. Quest lets each head choose pages of its own; one list of tokens serves all heads here, so the heads vote
over pages by softmax, as they do over tokens in `vote`. Quest leaves prefill dense; here blocks select pages too, by
the mean queries of their sub-blocks.
"""

from __future__ import annotations

import torch

from sglang_tokenselect.kernels.reference.vote import soft_vote
from sglang_tokenselect.selectors.base import Selector

PAGE_SIZE = 16
"""Tokens of a page, counted from the end of the sink."""


def vote_for_pages(query: torch.Tensor, keys: torch.Tensor, *, vote_scale: float = 1.0) -> torch.Tensor:
    """Each candidate has the votes of its page, so the best pages fill the budget, the last of them in part.

    For shapes see `soft_vote`.
    """
    num_candidates = keys.shape[0]
    dtype = torch.promote_types(query.dtype, torch.float32)
    smallest, largest = page_bounds(keys.to(dtype))
    query = query.to(dtype)
    # A component's largest product with anything between two values is that with one of them, as its sign says.
    bounds = torch.cat([largest, smallest], dim=-1)
    signed = torch.cat([query.clamp(min=0), query.clamp(max=0)], dim=-1)
    votes = soft_vote(signed, bounds, vote_scale=vote_scale)
    return votes.repeat_interleave(PAGE_SIZE, dim=-1)[:, :num_candidates]


def page_bounds(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Smallest and largest value of each component over each page; the last page may be short.

    Args:
        keys: [num_candidates, num_kv_heads, head_dim].

    Returns:
        Two of [num_pages, num_kv_heads, head_dim].
    """
    missing = -keys.shape[0] % PAGE_SIZE
    # The last key again, which changes no bound.
    padded = torch.cat([keys, keys[-1:].expand(missing, -1, -1)])
    smallest, largest = padded.unflatten(0, (-1, PAGE_SIZE)).aminmax(dim=1)
    return smallest, largest


PAGE = Selector("page", f"whole pages of {PAGE_SIZE} tokens by a bound of their logits, as Quest", vote_for_pages)
