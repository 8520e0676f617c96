# SPDX-License-Identifier: Apache-2.0
"""Prefill on a GPU: the blocks of an extend, planned on the host; their selection in each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import torch

from sglang_tokenselect.config import TokenSelectConfig
from sglang_tokenselect.gpu_buffers import GpuBuffers
from sglang_tokenselect.kernels.block_votes import BlockRanks
from sglang_tokenselect.kernels.paged_keys import PagedKeys
from sglang_tokenselect.kernels.reference.positions import Rope
from sglang_tokenselect.kernels.reference.prefill import Combine, cut_blocks, first_sparse_position
from sglang_tokenselect.kernels.reference.window import Window
from sglang_tokenselect.kernels.rotate import rotate
from sglang_tokenselect.kernels.rows import EVERYTHING
from sglang_tokenselect.kernels.select_blocks import PrefillBlock, PrefillPlan, plan_prefill, select_blocks
from sglang_tokenselect.kernels.shared_segment import SharedSegment
from sglang_tokenselect.kernels.transfer import int32, to_device
from sglang_tokenselect.planner import PADDING_ROW, PADDING_SLOT, RequestPlan
from sglang_tokenselect.runner import LayerInput
from sglang_tokenselect.slot_lists import SlotLists

if TYPE_CHECKING:
    from sglang_tokenselect.flashinfer_attention import PrefillAttention


@dataclass(frozen=True)
class _Extend:
    """An extend: its blocks, and in compact mode where each query is scored ([num_tokens] int32)."""

    plan: PrefillPlan
    lists: SlotLists
    positions: torch.Tensor | None


class GpuExtend:
    """Extends of one model, one after the other."""

    def __init__(
        self,
        config: TokenSelectConfig,
        buffers: GpuBuffers,
        req_to_token: torch.Tensor,
        attention: PrefillAttention,
        rope: Rope | None,
        ranks: BlockRanks | None,
    ) -> None:
        """For the arguments see GpuRunner."""
        self._config, self._buffers, self._req_to_token = config, buffers, req_to_token
        self._attention, self._rope, self._ranks = attention, rope, ranks
        self._extend: _Extend  # of the last `begin`

    def cut(self, requests: Sequence[RequestPlan], windows: Sequence[Window]) -> list[PrefillBlock]:
        """The early part of each request's queries in one piece, then its blocks, in order of the queries."""
        cuts = map(self._cut_request, requests, windows)
        return [block for blocks in cuts for block in blocks]

    def begin(
        self,
        blocks: Sequence[PrefillBlock],
        requests: Sequence[RequestPlan] = (),
        shared: Sequence[SharedSegment] = (),
    ) -> None:
        """Once per extend.

        Args:
            requests: those of the forward, in its order, which `shared` counts; none needed where nobody shares.
            shared: see ForwardPlan.shared.
        """
        config, buffers, device = self._config, self._buffers, self._req_to_token.device
        plan = plan_prefill(
            blocks,
            buffers.prefill_limits,
            block=config.block,
            sub_block=config.queries_per_vote,
            num_sink=config.sink,
            num_local=config.local,
            num_qo_heads=buffers.workspace.num_qo_heads,
            device=device,
            shared=[
                replace(segment, rows=tuple(requests[row].req_pool_idx for row in segment.rows)) for segment in shared
            ],
        )
        rows = int32([block.req_pool_idx for block in blocks])
        ends = int32([block.end if block.is_dense else 0 for block in blocks])
        positions = self._score_positions(blocks) if self._rope is not None else int32([])
        rows, ends, positions = to_device((rows, ends, positions), device)
        indices = torch.empty(plan.num_slots, dtype=torch.int32, device=device)
        lists = SlotLists(plan.kv_indptr, plan.kv_indptr_cpu, indices)
        self._extend = _Extend(plan, lists, positions if self._rope is not None else None)
        self._attention.plan(plan.qo_indptr_cpu, lists)
        lists.write_first_slots(self._req_to_token, rows.long(), ends)

    def select(self, query: torch.Tensor, layer: LayerInput) -> None:
        """Writes what each block attends to in one layer."""
        config, buffers, extend = self._config, self._buffers, self._extend
        if extend.positions is not None and self._rope is not None:
            scored = torch.empty_like(query)
            rotate(query, extend.positions, self._rope.cos_sin_cache, out=scored)
            query = scored
        select_blocks(
            query,
            PagedKeys(layer.key_pool, self._req_to_token, layer.k_scale),
            extend.plan,
            buffers.workspace,
            buffers.scratch,
            buffers.means,
            extend.lists.kv_indices,
            vote_scale=config.vote_scale,
            combine=cast(Combine, config.combine),
            ranks=self._ranks,
        )

    def attend(self, query: torch.Tensor, layer: LayerInput) -> torch.Tensor:
        return self._attention.run(query, layer)

    def warm_up(self, layer: LayerInput) -> None:
        """Compiles the selection's kernels, which would otherwise keep the first long requests waiting for seconds.

        They come in variants for few and for many blocks; blocks of one query will do.

        Args:
            layer: any; only the slot is written that belongs to no token.
        """
        layer.key_pool[PADDING_SLOT] = 0
        start = self._config.window.dense_len + 1
        if start >= self._buffers.prefill_limits.max_seq_len:
            return  # no request can be long enough to select
        num_blocks, most = 1, self._buffers.prefill_limits.max_rows
        while num_blocks <= most:
            self.begin([PrefillBlock(PADDING_ROW, start, start + 1, i, self._config.budget) for i in range(num_blocks)])
            self.select(self._buffers.means.new_zeros(num_blocks, *self._buffers.means.shape[1:]), layer)
            num_blocks *= 2

    def _cut_request(self, request: RequestPlan, window: Window) -> list[PrefillBlock]:
        block, start, end = self._config.block, request.prefix_len, request.prompt_end
        sparse = first_sparse_position(start, end, block, window)
        cuts = [(start, sparse, EVERYTHING, 0)] if sparse > start else []
        cuts += [(lo, hi, window.budget, 0) for lo, hi in cut_blocks(sparse, end, block)]
        # Generated before a retraction: each query by itself, its own token in its local window, as in decode.
        dense_end = min(max(window.dense_len, end), request.seq_len)
        cuts += [(end, dense_end, EVERYTHING, 0)] if dense_end > end else []
        cuts += [(lo, lo + 1, window.budget, 1) for lo in range(dense_end, request.seq_len)]
        return [
            PrefillBlock(request.req_pool_idx, lo, hi, request.first_query + lo - start, budget, own_local)
            for lo, hi, budget, own_local in cuts
        ]

    def _score_positions(self, blocks: Sequence[PrefillBlock]) -> torch.Tensor:
        """Where queries are rotated to for scoring: the first of a block next to its local window.

        Those that do not score stay at 0, since the table of positions may be shorter than their request.
        """
        positions: list[int] = []
        for block in blocks:
            num_queries = block.end - block.start
            first = self._config.local
            positions += [0] * num_queries if block.is_dense else range(first, first + num_queries)
        return int32(positions)
