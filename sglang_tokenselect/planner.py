# SPDX-License-Identifier: Apache-2.0
"""One plan per forward: which tokens are whose. Host integers only, made before the first layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sglang_tokenselect.kernels.reference.window import Window
from sglang_tokenselect.kernels.shared_segment import SharedSegment

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

PADDING_ROW = 0
"""Row of `req_to_token` that SGLang gives to no request: that of the rows that pad a CUDA graph's batch."""

PADDING_SLOT = 0
"""Slot of the KV pool that SGLang gives to no token; all of PADDING_ROW points to it."""


@dataclass(frozen=True)
class RequestPlan:
    """One request's part of a forward.

    Attributes:
        req_pool_idx: its row of `req_to_token`.
        seq_len: its cached tokens, those of this forward included.
        first_query: where its queries begin in the forward's query tensor.
        num_queries: 1 in decode.
        window: of a request with options of its own; None: as configured, in decode as the effort level says.
        prompt_len: tokens of its prompt. What follows was generated before a retraction; in an extend each such token
            selects by itself, as it did in decode. None: all are of the prompt.
    """

    req_pool_idx: int
    seq_len: int
    first_query: int
    num_queries: int
    window: Window | None = None
    prompt_len: int | None = None

    @property
    def prefix_len(self) -> int:
        return self.seq_len - self.num_queries

    @property
    def prompt_end(self) -> int:
        """Of an extend, the position after the last that is selected for in blocks."""
        return self.seq_len if self.prompt_len is None else min(max(self.prompt_len, self.prefix_len), self.seq_len)


@dataclass(frozen=True)
class ForwardPlan:
    """The requests of one forward, in batch order, those that pad it included.

    Attributes:
        shared: what requests share of their prefixes; rows index `requests`, none that pads among them.
    """

    is_decode: bool
    requests: tuple[RequestPlan, ...]
    shared: tuple[SharedSegment, ...] = ()


@dataclass(frozen=True)
class StagedRequests:
    """What the scheduler told about the requests of a forward, in batch order, without padding.

    Attributes:
        rows: `req_pool_indices` on the host.
        windows: see RequestPlan.window; empty if nobody has one.
        shared: see ForwardPlan.shared.
        prompt_lens: see RequestPlan.prompt_len; empty in decode.
    """

    rows: Sequence[int]
    windows: Sequence[Window | None]
    shared: tuple[SharedSegment, ...] = ()
    prompt_lens: Sequence[int | None] = ()


def plan_forward(forward_batch: ForwardBatch, staged: StagedRequests | None = None) -> ForwardPlan:
    """Reads the batch's host-side lengths.

    Args:
        staged: None reads the rows from the batch, which waits for the device: only where SGLang's scheduler did not
            tell them (warm-up, unit tests).
    """
    is_decode = forward_batch.forward_mode.is_decode()
    if staged is None:
        rows = forward_batch.req_pool_indices.tolist()
        staged = StagedRequests(rows, ())
    seq_lens = forward_batch.seq_lens_cpu.tolist()
    rows = [*staged.rows, *[PADDING_ROW] * (len(seq_lens) - len(staged.rows))]
    windows = [*staged.windows, *[None] * (len(seq_lens) - len(staged.windows))]
    prompt_lens = [*staged.prompt_lens, *[None] * (len(seq_lens) - len(staged.prompt_lens))]
    lengths = [1] * len(rows) if is_decode else list(forward_batch.extend_seq_lens_cpu)
    requests, first_query = [], 0
    for row, seq_len, num_queries, window, prompt_len in zip(
        rows, seq_lens, lengths, windows, prompt_lens, strict=True
    ):
        requests.append(RequestPlan(row, seq_len, first_query, num_queries, window, prompt_len))
        first_query += num_queries
    return ForwardPlan(is_decode, tuple(requests), staged.shared)
