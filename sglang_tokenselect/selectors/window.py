# SPDX-License-Identifier: Apache-2.0
"""Sink and local window alone, as wide as the budget allows (StreamingLLM, arXiv 2309.17453): the latest are chosen."""

from __future__ import annotations

import torch

from sglang_tokenselect.selectors.base import Selector


def latest(query: torch.Tensor, keys: torch.Tensor, *, vote_scale: float = 1.0) -> torch.Tensor:
    """The later a candidate, the higher its score; nothing else counts. For shapes see `soft_vote`."""
    ranks = torch.arange(keys.shape[0], dtype=torch.float32, device=keys.device)
    return ranks.expand(query.shape[0], -1)


WINDOW = Selector("window", "the latest tokens, whatever they say", latest)
