# SPDX-License-Identifier: Apache-2.0
"""The three token groups that a query attends to, and how many tokens they make."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Window:
    """Sizes in tokens: the sink, the voted budget and the local window (paper: n_init, k, n_local).

    Attributes:
        min_len: requests up to this length attend to everything, even if the window is smaller.
    """

    num_sink: int
    budget: int
    num_local: int
    min_len: int = 0

    @property
    def size(self) -> int:
        """Tokens that a selection attends to, the block of a prefill not counted."""
        return self.num_sink + self.budget + self.num_local

    @property
    def dense_len(self) -> int:
        """Length up to which a request attends to everything."""
        return max(self.size, self.min_len)

    def attended_length(self, seq_len: int) -> int:
        """Tokens that a decode query of a request with ``seq_len`` cached tokens attends to."""
        return seq_len if seq_len <= self.dense_len else self.size

    def num_candidates(self, seq_len: int) -> int:
        """Tokens that such a decode query votes on; 0: it attends to everything, or chooses nothing."""
        return seq_len - self.num_sink - self.num_local if seq_len > self.dense_len and self.budget else 0

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
