# SPDX-License-Identifier: Apache-2.0
"""What was attended to so far. Plain sums, read by `/server_info` and never printed per step."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from sglang_tokenselect.kernels.reference.window import Window
from sglang_tokenselect.planner import PADDING_ROW, ForwardPlan


@dataclass
class Counters:
    """Sums since the server started. Tokens are counted once per step, votes once per layer.

    Attributes:
        decode_queries: decode steps, summed over requests.
        cached_tokens: tokens that these queries could have attended to.
        attended_tokens: tokens that they attended to in layers that select.
        dense_queries: those among them that attended to everything, since they were short or asked for it.
        votes: selections made for decode queries.
        reuses: decode queries that a cached selection served.
        uncached_queries: decode queries that voted because the selection cache had no entry left for them.
        shared_queries: decode queries that selected while their request shared a prefix with enough others that did, so
            that it was scored once for all. On a CPU, where each is scored by itself: that would have been.
        block_votes: selections made for prefill blocks.
    """

    decode_queries: int = 0
    cached_tokens: int = 0
    attended_tokens: int = 0
    dense_queries: int = 0
    votes: int = 0
    reuses: int = 0
    uncached_queries: int = 0
    shared_queries: int = 0
    block_votes: int = 0

    def count_decode(self, plan: ForwardPlan, window: Window, min_group: int) -> None:
        """
        Args:
            window: of requests without one of their own.
            min_group: requests that must select for what they share to be scored once.
        """
        for request in plan.requests:
            if request.req_pool_idx != PADDING_ROW:
                attended = (request.window or window).attended_length(request.seq_len)
                self.decode_queries += 1
                self.cached_tokens += request.seq_len
                self.attended_tokens += attended
                self.dense_queries += attended == request.seq_len
        for segment in plan.shared:
            if segment.start == 0:
                requests = [plan.requests[row] for row in segment.rows]
                selecting = sum((request.window or window).num_candidates(request.seq_len) > 0 for request in requests)
                self.shared_queries += selecting if selecting >= min_group else 0

    def to_dict(self) -> dict[str, int]:
        return asdict(self)
