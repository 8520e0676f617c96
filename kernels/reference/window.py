# SPDX-License-Identifier: Apache-2.0
"""The three token groups that a query attends to, and how many tokens they make."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Window:
    """Sizes in tokens: the sink, the voted budget and the local window (paper: n_init, k, n_local)."""

    num_sink: int
    budget: int
    num_local: int

    @property
    def size(self) -> int:
        """Tokens attended at most, the block of a prefill not counted."""
        return self.num_sink + self.budget + self.num_local

    def attended_length(self, seq_len: int) -> int:
        """Tokens that a decode query of a request with ``seq_len`` cached tokens attends to."""
        return min(seq_len, self.size)

    def positions(self, ranked: torch.Tensor, end: int, *, age: int = 0) -> torch.Tensor:
        """Sink, voted and local positions before ``end``, ascending.

        Args:
            ranked: [>= budget - age] int64, voted positions, best first.
            end: the local window is ``[end - num_local - age, end)``.
            age: tokens that came since the vote. The local window grows by as many and the vote
                loses its lowest ranks, so that the length stays the same.

        Returns:
            [num_sink + budget + num_local] int64.
        """
        voted = ranked[: self.budget - age].sort().values
        sink = torch.arange(self.num_sink, device=ranked.device)
        local = torch.arange(end - self.num_local - age, end, device=ranked.device)
        return torch.cat([sink, voted, local])
