# SPDX-License-Identifier: Apache-2.0
"""Decode on a GPU: what the rows of a step attend to, planned on the host; their selection in each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from sglang_tokenselect.config import TokenSelectConfig
from sglang_tokenselect.effort import Effort
from sglang_tokenselect.gpu_buffers import STEP_SECTIONS, GpuBuffers, graph_index_slots
from sglang_tokenselect.kernels.paged_keys import PagedKeys
from sglang_tokenselect.kernels.reference.positions import Rope
from sglang_tokenselect.kernels.reference.window import Window
from sglang_tokenselect.kernels.rotate import rotate
from sglang_tokenselect.kernels.rows import EVERYTHING
from sglang_tokenselect.kernels.select_decode import DecodePart, select_decode
from sglang_tokenselect.kernels.selection_cache import DecodeBatch, Probe
from sglang_tokenselect.kernels.shared_plan import SharedPlan, SharedPrefixes
from sglang_tokenselect.kernels.shared_segment import SharedSegment
from sglang_tokenselect.kernels.transfer import aligned, int32, pinned, to_device
from sglang_tokenselect.kernels.vote_exchange import VoteExchange
from sglang_tokenselect.planner import RequestPlan
from sglang_tokenselect.runner import Graph, LayerInput
from sglang_tokenselect.slot_lists import SlotLists

if TYPE_CHECKING:
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch

    from sglang_tokenselect.flashinfer_attention import DecodeAttention


@dataclass(frozen=True)
class _Step:
    """A step: its rows as the kernels read them, and the parts that they are selected in."""

    batch: DecodeBatch
    lists: SlotLists
    parts: tuple[DecodePart, ...]


class GpuDecode:
    """Decode steps of one model, one after the other."""

    def __init__(
        self,
        config: TokenSelectConfig,
        layer_ids: Sequence[int],
        buffers: GpuBuffers,
        req_to_token: torch.Tensor,
        attention: DecodeAttention,
        rope: Rope | None,
        exchange: VoteExchange | None,
    ) -> None:
        """For the arguments see GpuRunner."""
        device = req_to_token.device
        self._config, self._buffers, self._req_to_token = config, buffers, req_to_token
        self._attention, self._rope, self._exchange = attention, rope, exchange
        self._layers = {layer_id: i for i, layer_id in enumerate(layer_ids)}
        self._max_rows = len(buffers.probe)
        self._positions = torch.full((self._max_rows,), config.local, dtype=torch.int32, device=device)
        self._graph_indices = torch.empty(0, dtype=torch.int32, device=device)
        self._padding_slots = 0
        self._step: _Step  # of the last `begin`
        # Asked several times in a step, with and without the rows that pad it, and most steps are like the one before.
        self._plan_shared = lru_cache(maxsize=4)(
            partial(SharedPlan.of, num_sink=config.sink, min_rows=max(config.min_group, 2))
        )
        self._written: SharedPlan | None = None

    def reserve_graph_rows(self, max_rows: int, max_context_len: int) -> None:
        """Index memory for graphs of up to `max_rows` requests. Graphs captured before are not replayed again."""
        if max_rows > self._max_rows:
            raise ValueError(f"CUDA graph batch size: expected at most {self._max_rows}, got {max_rows}")
        num_slots = graph_index_slots(self._config, max_rows, max_context_len)
        self._graph_indices = torch.zeros(num_slots, dtype=torch.int32, device=self._req_to_token.device)
        self._padding_slots = max_rows
        self._attention.forget_graphs()

    def fits_graph(self, seq_lens: Sequence[int], windows: Sequence[Window], shared: tuple[SharedSegment, ...]) -> bool:
        """Whether a graph's one part and its slots are enough for a step of such requests."""
        num_slots = sum(window.attended_length(n) for n, window in zip(seq_lens, windows, strict=True))
        if num_slots + self._padding_slots > len(self._graph_indices):
            return False
        candidates = count_candidates(seq_lens, windows)
        return len(self._cut_rows(candidates, self.share(candidates, shared))) == 1

    def share(self, candidates: Sequence[int], shared: tuple[SharedSegment, ...]) -> SharedPlan | None:
        """What is scored for several rows at once; None: nothing.

        Args:
            candidates: see count_candidates.
        """
        if not shared:
            return None
        # Behind the last segment there is nothing to share; so growing requests ask for the same.
        end = max(segment.end for segment in shared) - self._config.sink
        plan = self._plan_shared(shared, tuple(min(n, end) for n in candidates))
        return plan if plan.segments else None

    def _cut_rows(self, candidates: Sequence[int], plan: SharedPlan | None) -> list[range]:
        return self._buffers.workspace.cut_rows(candidates, plan.shared_tiles if plan else None)

    def begin(
        self,
        seq_lens: Sequence[int],
        windows: Sequence[Window],
        cache_slots: Sequence[int],
        effort: Effort,
        probed_layer: int,
        shared: tuple[SharedSegment, ...],
        forward_batch: ForwardBatch,
        graph: Graph,
        *,
        captures_shared: bool = False,
    ) -> None:
        """Once per step.

        Args:
            seq_lens: of each row, those that pad a graph included.
            windows: of each row.
            cache_slots: entry of the selection cache of each row; -1: none.
            probed_layer: see Probe.layer.
            shared: see ForwardPlan.shared.
            captures_shared: the graph that is captured is for steps that share.
        """
        num_rows, in_graph = len(seq_lens), graph is not Graph.NONE
        rows = list(zip(seq_lens, windows, strict=True))
        budgets = [window.budget if n > window.dense_len else EVERYTHING for n, window in rows]
        kv_indptr_cpu = int32([0, *accumulate(window.attended_length(n) for n, window in rows)])
        step = self._write_step(kv_indptr_cpu, budgets, cache_slots, effort, probed_layer)
        kv_indptr = step[0, : num_rows + 1]
        kv_indices = self._graph_indices if in_graph else self._graph_indices.new_empty(int(kv_indptr_cpu[-1]))
        lists = SlotLists(kv_indptr, kv_indptr_cpu, kv_indices)
        batch = DecodeBatch(
            req_pool_indices=forward_batch.req_pool_indices[:num_rows],
            seq_lens=forward_batch.seq_lens[:num_rows],
            budgets=step[1, :num_rows],
            cache_slots=step[2, :num_rows],
            kv_indptr=kv_indptr,
            theta=step[3, :1].view(torch.float32),
            max_reuse=step[3, 1:2],
            probe=Probe(step[3, 2:3], self._buffers.probe),
        )
        if graph is Graph.CAPTURE:
            parts: tuple[DecodePart, ...] = (self._graph_part(num_rows, captures_shared),)
            if captures_shared:
                self._write_shared(SharedPlan.empty(num_rows))
        else:
            candidates = count_candidates(seq_lens, windows)
            parts = self._make_parts(candidates, self.share(candidates, shared))
        self._step = _Step(batch, lists, parts)
        plans = {
            Graph.NONE: self._attention.plan,
            Graph.CAPTURE: self._attention.plan_capture,
            Graph.REPLAY: self._attention.plan_replay,
        }
        plans[graph](lists)
        # Rows that select have their first tokens there until a layer writes its own.
        lists.write_first_slots(self._req_to_token, batch.req_pool_indices, kv_indptr.diff())

    def select(self, query: torch.Tensor, layer: LayerInput) -> None:
        """Writes what each row attends to in one layer."""
        config, buffers, step, index = self._config, self._buffers, self._step, self._layers[layer.layer_id]
        if self._rope is not None:
            num_rows = query.shape[0]
            scored = buffers.rotated[:num_rows]
            rotate(query, self._positions[:num_rows], self._rope.cos_sin_cache, out=scored)
            query = scored
        select_decode(
            query,
            PagedKeys(layer.key_pool, self._req_to_token, layer.k_scale),
            step.batch,
            buffers.caches.layer(index),
            buffers.rows,
            buffers.workspace,
            step.lists.kv_indices,
            num_sink=config.sink,
            num_local=config.local,
            vote_scale=config.vote_scale,
            parts=step.parts,
            layer=index,
            exchange=self._exchange,
        )

    def attended_positions(self, request: RequestPlan) -> torch.Tensor:
        """Of a request that selects, in the layer that ran last. Waits for the device."""
        lists, row = self._step.lists, request.first_query
        attended = lists.kv_indices[lists.kv_indptr_cpu[row] : lists.kv_indptr_cpu[row + 1]]
        slots = self._req_to_token[request.req_pool_idx, : request.seq_len]
        return torch.isin(slots, attended).nonzero().flatten()

    def attend(self, query: torch.Tensor, layer: LayerInput) -> torch.Tensor:
        return self._attention.run(query, layer)

    def _graph_part(self, num_rows: int, shares: bool) -> DecodePart:
        """All rows; what they share is read from memory that each step writes."""
        return DecodePart(range(num_rows), SharedPrefixes.view(self._buffers.shared, num_rows) if shares else None)

    def _make_parts(self, candidates: Sequence[int], plan: SharedPlan | None) -> tuple[DecodePart, ...]:
        """For this step, eager or replayed."""
        runs = self._cut_rows(candidates, plan)
        if plan is None:
            return tuple(map(DecodePart, runs))
        if len(runs) == 1:
            self._write_shared(plan)
            return (self._graph_part(len(candidates), True),)
        memories = tuple(torch.empty(SharedPrefixes.count_ints(len(rows)), dtype=torch.int32) for rows in runs)
        for rows, memory in zip(runs, memories, strict=True):
            plan.part(rows).write(memory)
        memories = to_device(memories, self._req_to_token.device)
        return tuple(
            DecodePart(rows, SharedPrefixes.view(memory, len(rows)))
            for rows, memory in zip(runs, memories, strict=True)
        )

    def _write_shared(self, plan: SharedPlan) -> None:
        """To where graphs read it, unless it is there."""
        if plan != self._written:
            memory = torch.empty(SharedPrefixes.count_ints(len(plan.segment)), dtype=torch.int32)
            plan.write(memory)
            target = self._buffers.shared
            target[: len(memory)].copy_(pinned(memory, target.device), non_blocking=True)
            self._written = plan

    def _write_step(
        self,
        kv_indptr: torch.Tensor,
        budgets: Sequence[int],
        cache_slots: Sequence[int],
        effort: Effort,
        probed_layer: int,
    ) -> torch.Tensor:
        """In one copy, to where graphs of this batch size read them.

        Returns:
            [STEP_SECTIONS, at least num_rows + 1] int32: kv_indptr; budgets; cache slots; theta's bits, max_reuse, and
            the probed layer.
        """
        num_rows = len(budgets)
        section = aligned(max(num_rows + 1, 3))
        host = torch.zeros(STEP_SECTIONS, section, dtype=torch.int32)
        host[0, : num_rows + 1] = kv_indptr
        host[1, :num_rows] = int32(budgets)
        host[2, :num_rows] = int32(cache_slots)
        host[3].view(torch.float32)[0] = effort.theta
        host[3, 1:3] = int32([effort.max_reuse, probed_layer])
        step = self._buffers.step[: STEP_SECTIONS * section].view(STEP_SECTIONS, section)
        step.copy_(pinned(host, step.device), non_blocking=True)
        return step


def count_candidates(seq_lens: Sequence[int], windows: Sequence[Window]) -> list[int]:
    """Of each row, if it does not reuse a selection."""
    return [window.num_candidates(n) for n, window in zip(seq_lens, windows, strict=True)]
