# SPDX-License-Identifier: Apache-2.0
"""The selection cache: reuse of an earlier vote while the query stays similar (paper, section 3.3)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .window import Window


@dataclass(frozen=True)
class CachedSelection:
    """What one request keeps of its last vote in one layer.

    Attributes:
        query: [num_qo_heads, head_dim], the query that voted; under tensor parallelism this rank's heads.
        ranked: [budget] int64, positions voted for, best first.
        seq_len: cached tokens of the request when it voted.
    """

    query: torch.Tensor
    ranked: torch.Tensor
    seq_len: int

    def serves(
        self,
        query: torch.Tensor,
        seq_len: int,
        window: Window,
        *,
        theta: float,
        max_reuse: int,
        sum_over_ranks: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> bool:
        """Whether this vote may stand in for a vote of ``query``, ``age`` tokens later.

        The vote must be young (age < max_reuse), must still fill the window after giving up ``age``
        of its ranks to the local tokens, and the cosine over all heads must reach ``theta``.

        Args:
            sum_over_ranks: adds up a tensor [3] over the ranks that have the layer's heads; None: all heads are here.
                It is called on all ranks or on none, since all else that decides is the same on each.
        """
        age = seq_len - self.seq_len
        if not 0 <= age < max_reuse or not 0 <= window.budget - age <= self.ranked.numel():
            return False
        dtype = torch.promote_types(query.dtype, torch.float32)
        new, old = query.flatten().to(dtype), self.query.flatten().to(dtype)
        products = torch.stack([new.dot(old), new.dot(new), old.dot(old)])
        if sum_over_ranks is not None:
            products = sum_over_ranks(products)
        dot, norm, old_norm = products.double()  # where the product of two norms is in the range
        return bool(dot >= theta * (norm * old_norm).sqrt().clamp(min=1e-30))
