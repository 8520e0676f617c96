# SPDX-License-Identifier: Apache-2.0
"""Selection by the Triton kernels and attention by FlashInfer, for all requests of a forward at once.

Once per forward, on the host: how many tokens each request attends to, who holds which entry of the selection cache,
FlashInfer's plan. In each layer, on the device: the selection, then the attention over it. Where nothing selects,
SGLang's own FlashInfer backend takes over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from sglang.kernels.ops.kvcache.kv_indices import create_flashinfer_kv_indices_triton

from sglang_tokenselect.cache_slots import CacheSlots
from sglang_tokenselect.config import TokenSelectConfig
from sglang_tokenselect.counters import Counters
from sglang_tokenselect.gpu_buffers import GpuBuffers, graph_index_slots
from sglang_tokenselect.kernels.block_plan import int32, to_device
from sglang_tokenselect.kernels.paged_keys import PagedKeys
from sglang_tokenselect.kernels.reference.positions import Rope
from sglang_tokenselect.kernels.reference.prefill import cut_blocks, first_sparse_position
from sglang_tokenselect.kernels.rotate import rotate
from sglang_tokenselect.kernels.select_blocks import PrefillBlock, PrefillPlan, plan_prefill, select_blocks
from sglang_tokenselect.kernels.select_decode import select_decode
from sglang_tokenselect.kernels.selection_cache import DecodeBatch
from sglang_tokenselect.planner import PADDING_ROW, PADDING_SLOT, ForwardPlan, RequestPlan
from sglang_tokenselect.runner import Graph, LayerInput
from sglang_tokenselect.slot_lists import SlotLists

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from sglang_tokenselect.flashinfer_attention import DecodeAttention, PrefillAttention

EVERYTHING = -1
"""Budget of rows and blocks that attend to everything, in the kernels' terms."""


@dataclass(frozen=True)
class _Decode:
    """A decode step: its rows as the kernels read them, and how many parts they are selected in."""

    batch: DecodeBatch
    lists: SlotLists
    num_parts: int


@dataclass(frozen=True)
class _Extend:
    """An extend: its blocks, and in compact mode where each query is scored ([num_tokens] int32)."""

    plan: PrefillPlan
    lists: SlotLists
    positions: torch.Tensor | None


class GpuRunner:
    """Runs the layers of one model on one GPU; see `runner.Runner`."""

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
    ) -> None:
        """
        Args:
            layer_ids: of the layers that select.
            buffers: for as many layers as these.
            req_to_token: [num_rows, max_context_len] int32, the slot of each position of each row.
            dense: an AttentionBackend for what attends to everything; None: this runner attends to it.
            dense_in_all_forwards: some layers always need it.
            rope: in compact mode, its table in float32.
        """
        self.config, self.dense, self.selects = config, dense, False
        self._counters = Counters()
        self._slots = CacheSlots(config.cache_requests)
        self._dense_in_all_forwards = dense_in_all_forwards
        self._caches = {layer_id: buffers.caches.layer(i) for i, layer_id in enumerate(layer_ids)}
        self._buffers, self._req_to_token, self._rope = buffers, req_to_token, rope
        self._device = req_to_token.device
        self._max_rows = buffers.decode.limits.max_rows
        self._decode_attention, self._prefill_attention = decode_attention, prefill_attention
        self._theta = torch.tensor([config.theta], dtype=torch.float32, device=self._device)
        self._max_reuse = torch.tensor([config.max_reuse], dtype=torch.int32, device=self._device)
        self._decode_positions = torch.full((self._max_rows,), config.local, dtype=torch.int32, device=self._device)
        self._graph_indices = torch.empty(0, dtype=torch.int32, device=self._device)
        self._delegated = False
        self._current: _Decode | _Extend | None = None

    def reserve_graph_rows(self, max_rows: int, max_context_len: int) -> None:
        if max_rows > self._max_rows:
            raise ValueError(f"CUDA graph batch size: expected at most {self._max_rows}, got {max_rows}")
        num_slots = graph_index_slots(self.config, max_rows, max_context_len)
        self._graph_indices = torch.zeros(num_slots, dtype=torch.int32, device=self._device)
        if self.dense is not None:
            # Forwards in which nothing selects have no request beyond dense_len.
            indices = None if self._dense_in_all_forwards else torch.zeros_like(self._graph_indices)
            self.dense.init_cuda_graph_state(max_rows, max_rows, kv_indices_buf=indices)

    def warm_up(self, layer: LayerInput) -> None:
        """Compiles the kernels of prefill, which would otherwise keep the first long requests waiting for seconds.

        They come in variants for few and for many blocks. Those of decode are compiled when graphs are captured.

        Args:
            layer: any; only the slot is written that belongs to no token.
        """
        layer.key_pool[PADDING_SLOT] = 0
        block, window = self.config.block, self.config.window
        start = (window.dense_len // block + 1) * block
        if start + block > self._req_to_token.shape[1]:
            return  # no request can be long enough to select
        num_blocks, most = 1, self._buffers.prefill.limits.max_rows
        while num_blocks <= most:
            requests = tuple(RequestPlan(PADDING_ROW, start + block, i * block, block) for i in range(num_blocks))
            self._begin_extend(ForwardPlan(is_decode=False, requests=requests))
            shape = (num_blocks * block, self._buffers.decode.num_qo_heads, layer.key_pool.shape[2])
            self._select_blocks(
                torch.zeros(shape, dtype=layer.key_pool.dtype, device=self._device), layer, self._current
            )
            num_blocks *= 2
        self._counters = Counters()

    def decode_selects(self, seq_lens: Sequence[int]) -> bool:
        return max(seq_lens, default=0) > self.config.window.dense_len

    def fits_graph(self, seq_lens: Sequence[int]) -> bool:
        """Whether one part holds the candidates of a step, as it must in a graph."""
        return self._count_parts(seq_lens) == 1

    def delegates(self, layer_id: int) -> bool:
        return self._delegated or layer_id not in self._caches

    def report(self) -> Counters:
        """Counters so far, those of the device included; waits for the device."""
        reuses, votes = self._buffers.caches.counters.sum(0).tolist()
        return replace(self._counters, reuses=reuses, votes=votes)

    def begin(
        self,
        plan: ForwardPlan,
        forward_batch: ForwardBatch,
        graph: Graph = Graph.NONE,
        *,
        selects: bool | None = None,
    ) -> None:
        if plan.is_decode:
            self._begin_decode(plan, forward_batch, graph, selects)
        else:
            self._begin_extend(plan)
        if self.dense is not None and (self._delegated or self._dense_in_all_forwards):
            self._begin_dense(forward_batch, graph)

    def run(self, query: torch.Tensor, layer: LayerInput) -> torch.Tensor:
        if isinstance(self._current, _Decode):
            if self.selects:
                self._select_decode(query, layer, self._current)
            attention = self._decode_attention
        else:
            if self.selects:
                self._select_blocks(query, layer, self._current)
            attention = self._prefill_attention
        return attention.run(query, (layer.key_pool, layer.value_pool), layer.scaling)

    # -- decode

    def _begin_decode(self, plan: ForwardPlan, forward_batch: ForwardBatch, graph: Graph, selects: bool | None) -> None:
        window, requests = self.config.window, plan.requests
        is_sparse = [request.seq_len > window.dense_len for request in requests]
        self.selects = any(is_sparse) if selects is None else selects
        self._delegated = self.dense is not None and not self.selects
        sparse_rows = [request.req_pool_idx for request, sparse in zip(requests, is_sparse, strict=True) if sparse]
        lent, fresh = self._slots.lend(sparse_rows)
        if fresh:
            self._buffers.caches.forget(_copy_to(self._device, torch.tensor(fresh)))
        self._counters.count_decode(plan, window)
        self._counters.uncached_queries += lent.count(-1)
        if self._delegated:
            return
        entries = iter(lent)
        lists, budgets, cache_slots = self._write_step(
            lengths=[window.attended_length(request.seq_len) for request in requests],
            budgets=[self.config.budget if sparse else EVERYTHING for sparse in is_sparse],
            cache_slots=[next(entries) if sparse else -1 for sparse in is_sparse],
            in_graph=graph is not Graph.NONE,
        )
        batch = DecodeBatch(
            req_pool_indices=forward_batch.req_pool_indices[: len(requests)],
            seq_lens=forward_batch.seq_lens[: len(requests)],
            budgets=budgets,
            cache_slots=cache_slots,
            kv_indptr=lists.kv_indptr,
            theta=self._theta,
            max_reuse=self._max_reuse,
        )
        in_graph = graph is not Graph.NONE
        num_parts = 1 if in_graph else self._count_parts([request.seq_len for request in requests])
        self._current = _Decode(batch, lists, num_parts)
        self._plan_decode(lists, graph)
        # Rows that select have their first tokens here until the first layer writes its own.
        lengths = lists.kv_indptr.diff()
        self._write_everything(batch.req_pool_indices, lengths, lists)

    def _write_step(
        self, lengths: list[int], budgets: list[int], cache_slots: list[int], *, in_graph: bool
    ) -> tuple[SlotLists, torch.Tensor, torch.Tensor]:
        """What changes from step to step, in one copy to where graphs of this batch size read it."""
        num_rows = len(lengths)
        kv_indptr_cpu = int32([0, *accumulate(lengths)])
        section = -(-(num_rows + 1) // 4) * 4  # at multiples of 16 bytes, see to_device
        host = torch.zeros(3, section, dtype=torch.int32)
        host[0, : num_rows + 1] = kv_indptr_cpu
        host[1, :num_rows] = int32(budgets)
        host[2, :num_rows] = int32(cache_slots)
        step = self._buffers.step[: 3 * section].view(3, section)
        step.copy_(_pinned(host, self._device), non_blocking=True)
        num_slots = int(kv_indptr_cpu[-1])
        indices = self._graph_indices if in_graph else torch.empty(num_slots, dtype=torch.int32, device=self._device)
        return SlotLists(step[0, : num_rows + 1], kv_indptr_cpu, indices), step[1, :num_rows], step[2, :num_rows]

    def _plan_decode(self, lists: SlotLists, graph: Graph) -> None:
        plans = {
            Graph.NONE: self._decode_attention.plan,
            Graph.CAPTURE: self._decode_attention.plan_capture,
            Graph.REPLAY: self._decode_attention.plan_replay,
        }
        plans[graph](lists)

    def _count_parts(self, seq_lens: Sequence[int]) -> int:
        window = self.config.window
        ends = window.num_sink + window.num_local
        candidates = [n - ends if n > window.dense_len and window.budget else 0 for n in seq_lens]
        return self._buffers.decode.limits.count_parts(candidates)

    def _select_decode(self, query: torch.Tensor, layer: LayerInput, step: _Decode) -> None:
        config, buffers = self.config, self._buffers
        if self._rope is not None:
            num_rows = query.shape[0]
            positions, out = self._decode_positions[:num_rows], buffers.rotated[:num_rows]
            query = self._rotated(query, positions, out)
        select_decode(
            query,
            PagedKeys(layer.key_pool, self._req_to_token),
            step.batch,
            self._caches[layer.layer_id],
            buffers.rows,
            buffers.decode,
            step.lists.kv_indices,
            num_sink=config.sink,
            num_local=config.local,
            vote_scale=config.vote_scale,
            num_parts=step.num_parts,
        )

    # -- extend

    def _begin_extend(self, plan: ForwardPlan) -> None:
        self._slots.release([request.req_pool_idx for request in plan.requests])
        blocks = [block for request in plan.requests for block in self._blocks_of(request)]
        num_sparse = sum(block.budget != EVERYTHING for block in blocks)
        self.selects = num_sparse > 0
        self._delegated = self.dense is not None and not self.selects
        self._counters.block_votes += num_sparse * len(self._caches)
        if self._delegated:
            return
        config, buffers = self.config, self._buffers
        prefill_plan = plan_prefill(
            blocks,
            buffers.prefill.limits,
            block=config.block,
            sub_block=config.sub_block,
            num_sink=config.sink,
            num_local=config.local,
            num_qo_heads=buffers.decode.num_qo_heads,
            device=self._device,
        )
        indices = torch.empty(prefill_plan.num_slots, dtype=torch.int32, device=self._device)
        lists = SlotLists(prefill_plan.kv_indptr, prefill_plan.kv_indptr_cpu, indices)
        positions = None if self._rope is None else self._score_positions(blocks)
        self._current = _Extend(prefill_plan, lists, positions)
        self._prefill_attention.plan(prefill_plan.qo_indptr_cpu, lists)
        if num_sparse < len(blocks):
            rows = int32([block.req_pool_idx for block in blocks])
            ends = int32([block.end if block.budget == EVERYTHING else 0 for block in blocks])
            rows, ends = to_device((rows, ends), self._device)
            self._write_everything(rows.long(), ends, lists)

    def _blocks_of(self, request: RequestPlan) -> list[PrefillBlock]:
        """The early part of a request's queries in one piece, then its blocks."""
        config, start, end = self.config, request.prefix_len, request.seq_len
        sparse = first_sparse_position(start, end, config.block, config.window)
        cuts = [(start, sparse, EVERYTHING)] if sparse > start else []
        cuts += [(lo, hi, config.budget) for lo, hi in cut_blocks(sparse, end, config.block)]
        return [
            PrefillBlock(request.req_pool_idx, lo, hi, request.first_query + lo - start, budget)
            for lo, hi, budget in cuts
        ]

    def _score_positions(self, blocks: list[PrefillBlock]) -> torch.Tensor:
        """Where queries are rotated to for scoring: the first of a block next to its local window."""
        local = self.config.local
        lengths = [block.end - block.start if block.budget != EVERYTHING else 0 for block in blocks]
        parts = [
            torch.arange(local, local + length, dtype=torch.int32)
            if length
            else torch.zeros(block.end - block.start, dtype=torch.int32)
            for block, length in zip(blocks, lengths, strict=True)
        ]
        return _copy_to(self._device, torch.cat(parts))

    def _select_blocks(self, query: torch.Tensor, layer: LayerInput, extend: _Extend) -> None:
        config, buffers = self.config, self._buffers
        if extend.positions is not None:
            query = self._rotated(query, extend.positions, torch.empty_like(query))
        select_blocks(
            query,
            PagedKeys(layer.key_pool, self._req_to_token),
            extend.plan,
            buffers.prefill,
            buffers.scratch,
            buffers.means,
            extend.lists.kv_indices,
            vote_scale=config.vote_scale,
            combine=config.combine,
        )

    # -- both

    def _begin_dense(self, forward_batch: ForwardBatch, graph: Graph) -> None:
        if graph is Graph.NONE:
            self.dense.init_forward_metadata(forward_batch)
            return
        # Of the graphs of one batch size, the first to be captured makes the wrappers that both use.
        is_first = forward_batch.batch_size not in self.dense.decode_cuda_graph_metadata
        self.dense.init_forward_metadata_out_graph(forward_batch, in_capture=graph is Graph.CAPTURE and is_first)

    def _write_everything(self, rows: torch.Tensor, lengths: torch.Tensor, lists: SlotLists) -> None:
        """The first `lengths` slots of each row, once for all layers."""
        create_flashinfer_kv_indices_triton[(len(lists),)](
            self._req_to_token,
            rows,
            lengths,
            lists.kv_indptr,
            None,
            lists.kv_indices,
            self._req_to_token.stride(0),
        )

    def _rotated(self, query: torch.Tensor, positions: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
        rotate(query, positions, self._rope.cos_sin_cache, out=out)
        return out


def _pinned(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy from pageable memory would wait for the stream."""
    return tensor.pin_memory() if device.type == "cuda" else tensor


def _copy_to(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    """A copy that the host does not wait for."""
    return _pinned(tensor, device).to(device, non_blocking=True)
