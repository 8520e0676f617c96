# SPDX-License-Identifier: Apache-2.0
"""Selection by the Triton kernels and attention by FlashInfer, for all requests of a forward at once.

Once per forward, on the host: who selects, who holds which entry of the selection cache, FlashInfer's plan. In each
layer, on the device: the selection, then the attention over it. Where nothing selects, SGLang's own FlashInfer
backend takes over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch

from sglang_tokenselect.cache_slots import CacheSlots
from sglang_tokenselect.config import TokenSelectConfig
from sglang_tokenselect.counters import Counters
from sglang_tokenselect.device_reads import DeviceReads
from sglang_tokenselect.gpu_buffers import GpuBuffers
from sglang_tokenselect.gpu_decode import GpuDecode, count_candidates
from sglang_tokenselect.gpu_extend import GpuExtend
from sglang_tokenselect.gpu_mass import NO_LAYER, GpuMass
from sglang_tokenselect.kernels.block_votes import BlockRanks
from sglang_tokenselect.kernels.reference.positions import Rope
from sglang_tokenselect.kernels.reference.window import Window
from sglang_tokenselect.kernels.shared_segment import SharedSegment
from sglang_tokenselect.kernels.transfer import to_device
from sglang_tokenselect.kernels.vote_exchange import VoteExchange
from sglang_tokenselect.kernels.workspace import MAX_SHARED_KV_HEADS
from sglang_tokenselect.planner import PADDING_ROW, ForwardPlan, RequestPlan
from sglang_tokenselect.runner import Graph, LayerInput, Runner, Step

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from sglang_tokenselect.flashinfer_attention import DecodeAttention, PrefillAttention


class GpuRunner(Runner):
    """Runs the layers of one model on one GPU."""

    def __init__(
        self,
        config: TokenSelectConfig,
        layer_ids: Sequence[int],
        buffers: GpuBuffers,
        req_to_token: torch.Tensor,
        decode_attention: DecodeAttention,
        prefill_attention: PrefillAttention,
        *,
        dense: Any = None,
        dense_in_all_forwards: bool = False,
        rope: Rope | None = None,
        sampled_layers: Sequence[Callable[[], LayerInput]] = (),
        exchange: VoteExchange | None = None,
        sum_over_ranks: Callable[[torch.Tensor], object] | None = None,
    ) -> None:
        """
        Args:
            layer_ids: of the layers that select.
            buffers: for as many layers as these.
            req_to_token: [num_rows, max_context_len] int32, the slot of each position of each row.
            dense: an AttentionBackend for what attends to everything; None: this runner attends to it.
            dense_in_all_forwards: some layers always need it.
            rope: in compact mode, its table in float32.
            sampled_layers: what each of `layer_ids` reads now, for samples of attention mass; none: no samples.
            exchange, sum_over_ranks: how the ranks of a tensor parallel group choose together, in decode (the whole of
                it in kernels) and in prefill (adds up a tensor in place); None: this process chooses alone.
        """
        super().__init__(config)
        self.dense, self.selects = dense, False
        self._rope = rope
        self._layer_ids, self._caches = frozenset(layer_ids), buffers.caches
        self._dense_in_all_forwards = dense_in_all_forwards
        self._slots, self._counts = CacheSlots(config.cache_requests), DeviceReads()
        self._mass = GpuMass(config, buffers.caches, buffers.probe, req_to_token, sampled_layers)
        self._dense_slots = 0
        if buffers.workspace.num_kv_heads > MAX_SHARED_KV_HEADS:
            self.min_group = 0
        self._decode = GpuDecode(config, layer_ids, buffers, req_to_token, decode_attention, rope, exchange)
        ranks = BlockRanks(sum_over_ranks, buffers.row_votes) if sum_over_ranks else None
        self._extend = GpuExtend(config, buffers, req_to_token, prefill_attention, rope, ranks)
        self._current: GpuDecode | GpuExtend = self._decode
        self._delegated = False

    def reserve_graph_rows(self, max_rows: int, max_context_len: int) -> None:
        self._decode.reserve_graph_rows(max_rows, max_context_len)
        if self.dense is not None:
            # Only with layers that are always dense has a graph of `dense` requests beyond dense_len.
            longest = max_context_len if self._dense_in_all_forwards else self.config.window.dense_len
            self._dense_slots = max_rows * min(longest, max_context_len)
            self.dense.reserve_graph_rows(max_rows, min(longest, max_context_len))

    def warm_up(self, layer: LayerInput) -> None:
        """See GpuExtend.warm_up. The kernels of decode are compiled when graphs are captured."""
        self._extend.warm_up(layer)

    def decode_step(
        self,
        seq_lens: Sequence[int],
        windows: Sequence[Window | None] = (),
        shared: tuple[SharedSegment, ...] = (),
    ) -> Step:
        step = super().decode_step(seq_lens, windows)
        if step is Step.SELECTS and shared:
            candidates = count_candidates(seq_lens, self._decode_windows(seq_lens, windows))
            return Step.SHARES if self._decode.share(candidates, shared) else step
        return step

    def fits_graph(
        self,
        seq_lens: Sequence[int],
        windows: Sequence[Window | None] = (),
        shared: tuple[SharedSegment, ...] = (),
    ) -> bool:
        is_delegated = self.dense is not None and not self.decode_selects(seq_lens, windows)
        if (is_delegated or self._dense_in_all_forwards) and sum(seq_lens) > self._dense_slots:
            return False
        if is_delegated:
            return True
        return self._decode.fits_graph(seq_lens, self._decode_windows(seq_lens, windows), shared)

    def _decode_windows(self, seq_lens: Sequence[int], windows: Sequence[Window | None]) -> list[Window]:
        return [own or self.decode_window for _, own in zip_longest(seq_lens, windows)]

    def delegates(self, layer_id: int) -> bool:
        return self._delegated or layer_id not in self._layer_ids

    def attended_positions(self, request: RequestPlan, layer_id: int) -> torch.Tensor | None:
        if self.delegates(layer_id) or request.seq_len <= self.decode_window_of(request).dense_len:
            return None
        return self._decode.attended_positions(request)

    def rope_of(self, layer_id: int) -> Rope | None:
        return self._rope

    def report(self) -> Counters:
        """Waits for the device."""
        self._count_on_device(*self._caches.counters.sum(0).tolist())
        return self.counters

    @property
    def lent_entries(self) -> int:
        return self._slots.num_lent

    def refresh_counters(self) -> None:
        for counts in self._counts.finished():
            self._count_on_device(*counts)
        self._counts.start(self._caches.counters.sum(0))

    def take_masses(self) -> list[tuple[float, int]]:
        return self._mass.take()

    def _count_on_device(self, reuses: int, votes: int) -> None:
        # A read that was started before a later one has been waited for is older than what is known.
        known = self.counters
        self.counters = replace(known, reuses=max(reuses, known.reuses), votes=max(votes, known.votes))

    def begin(
        self, plan: ForwardPlan, forward_batch: ForwardBatch, graph: Graph = Graph.NONE, *, step: Step | None = None
    ) -> None:
        if plan.is_decode:
            self._begin_decode(plan, forward_batch, graph, step)
        else:
            self._begin_extend(plan)
        if self.dense is not None and (self._delegated or self._dense_in_all_forwards):
            self.dense.begin(forward_batch, graph)

    def run(self, query: torch.Tensor, layer: LayerInput) -> torch.Tensor:
        if self.selects:
            self._current.select(query, layer)
        return self._current.attend(query, layer)

    def _begin_decode(self, plan: ForwardPlan, forward_batch: ForwardBatch, graph: Graph, step: Step | None) -> None:
        seq_lens = [request.seq_len for request in plan.requests]
        own = [request.window for request in plan.requests]
        self.selects = self.decode_selects(seq_lens, own) if step is None else step is not Step.EVERYTHING
        self._delegated = self.dense is not None and not self.selects
        self.counters.count_decode(plan, self.decode_window, self.min_group)
        windows = [self.decode_window_of(request) for request in plan.requests]
        # First, since entries that are lent anew are emptied.
        self._mass.measure(plan.requests)
        cache_slots = self._lend_entries(plan, windows)
        if not self._delegated:
            self._current = self._decode
            is_sampled = self.samples_mass and graph is not Graph.CAPTURE
            probed = self._mass.choose(plan.requests, cache_slots, self.effort) if is_sampled else NO_LAYER
            self._decode.begin(
                seq_lens,
                windows,
                cache_slots,
                self.effort,
                probed,
                plan.shared,
                forward_batch,
                graph,
                captures_shared=step is Step.SHARES,
            )

    def _lend_entries(self, plan: ForwardPlan, windows: Sequence[Window]) -> list[int]:
        """The entry of the selection cache of each row; -1: none, or none needed."""
        is_sparse = [request.seq_len > window.dense_len for request, window in zip(plan.requests, windows, strict=True)]
        rows = [request.req_pool_idx for request, sparse in zip(plan.requests, is_sparse, strict=True) if sparse]
        lent, fresh = self._slots.lend(rows)
        if fresh:
            self._caches.forget(to_device(torch.tensor(fresh), self._caches.seq_len.device))
        self.counters.uncached_queries += lent.count(-1)
        entries = iter(lent)
        return [next(entries) if sparse else -1 for sparse in is_sparse]

    def _begin_extend(self, plan: ForwardPlan) -> None:
        self._slots.release([request.req_pool_idx for request in plan.requests])
        self._mass.forget(plan.requests)
        blocks = self._extend.cut(plan.requests, [self.extend_window_of(request) for request in plan.requests])
        sparse = [block for block in blocks if not block.is_dense]
        self.selects = len(sparse) > 0
        self._delegated = self.dense is not None and not self.selects
        # SGLang captures prefill graphs with requests of no row of their own.
        self.counters.block_votes += sum(block.req_pool_idx != PADDING_ROW for block in sparse) * len(self._layer_ids)
        if not self._delegated:
            self._current = self._extend
            self._extend.begin(blocks, plan.requests, plan.shared)
