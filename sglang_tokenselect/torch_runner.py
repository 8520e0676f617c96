# SPDX-License-Identifier: Apache-2.0
"""Selection and attention in plain PyTorch, request by request, for machines without a GPU.

The semantics are in `kernels/reference/`; this file only leads each request of a forward through them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch

from sglang_tokenselect.config import TokenSelectConfig
from sglang_tokenselect.kernels.reference.attention import attend_positions
from sglang_tokenselect.kernels.reference.cache import CachedSelection
from sglang_tokenselect.kernels.reference.decode import select_for_query
from sglang_tokenselect.kernels.reference.kv import RequestKV
from sglang_tokenselect.kernels.reference.mass import candidate_mass
from sglang_tokenselect.kernels.reference.positions import Rope
from sglang_tokenselect.kernels.reference.prefill import (
    Combine,
    cut_blocks,
    first_sparse_position,
    select_for_block,
)
from sglang_tokenselect.kernels.reference.vote import Score
from sglang_tokenselect.kernels.reference.window import Window
from sglang_tokenselect.mass_sampling import MassSampling
from sglang_tokenselect.planner import ForwardPlan, RequestPlan
from sglang_tokenselect.ranks import ALONE, Ranks
from sglang_tokenselect.runner import Graph, LayerInput, Runner, Step


class TorchRunner(Runner):
    """Runs the layers of one model. Keeps the selection cache, keyed by `req_pool_idx` and layer."""

    def __init__(
        self,
        config: TokenSelectConfig,
        req_to_token: torch.Tensor,
        ropes: dict[int, Rope],
        sampled_layers: Sequence[int] = (),
        ranks: Ranks = ALONE,
    ) -> None:
        """
        Args:
            req_to_token: [num_rows, max_context_len] int32, the slot of each position of each row.
            ropes: per layer_id in compact mode, empty in absolute mode.
            sampled_layers: layer_ids that samples of attention mass are taken of; they select. Under tensor
                parallelism a sample is of this rank's heads.
            ranks: that choose together.
        """
        super().__init__(config)
        self._req_to_token = req_to_token
        self._ropes = ropes
        self._ranks = ranks
        self._score = _summed_score(config.selects_by.score, ranks)
        self._cached: dict[int, dict[int, CachedSelection]] = {}
        self._plan = ForwardPlan(is_decode=True, requests=())
        self._sampled_layers = sampled_layers
        self._sampling = MassSampling(config.mass_every, len(sampled_layers))
        self._sampled: tuple[int, RequestPlan] | None = None

    def begin(
        self, plan: ForwardPlan, forward_batch: Any = None, graph: Graph = Graph.NONE, *, step: Step | None = None
    ) -> None:
        """A prefill ends what is cached for its rows, whoever had them before."""
        self._plan, self._sampled = plan, None
        if plan.is_decode:
            self.counters.count_decode(plan, self.decode_window, self.min_group)
            self._choose_sample(plan)
        else:
            for request in plan.requests:
                self._cached.pop(request.req_pool_idx, None)

    def _choose_sample(self, plan: ForwardPlan) -> None:
        """Of requests without a window of their own: the samples judge the effort."""
        sparse = [r for r in plan.requests if r.window is None and r.seq_len > self.decode_window.dense_len]
        if self.samples_mass and (chosen := self._sampling.choose(len(sparse))) is not None:
            self._sampled = self._sampled_layers[chosen[0]], sparse[chosen[1]]

    def run(self, query: torch.Tensor, layer: LayerInput) -> torch.Tensor:
        out = torch.empty_like(query)
        attend_request = self._decode if self._plan.is_decode else self._extend
        for request in self._plan.requests:
            span = slice(request.first_query, request.first_query + request.num_queries)
            slots = self._req_to_token[request.req_pool_idx, : request.seq_len]
            kv = layer.request_kv(slots)
            out[span] = attend_request(query[span], kv, layer, request)
        return out

    def _decode(self, query: torch.Tensor, kv: RequestKV, layer: LayerInput, request: RequestPlan) -> torch.Tensor:
        window = self.decode_window_of(request)
        if self._attends_to_everything(request, layer.layer_id, window):
            return self._attend(query, kv, slice(None), layer)
        positions = _positions(self._selection(query[0], kv, layer, request, window), request, window)
        if self._sampled == (layer.layer_id, request):
            self._sample_mass(query[0], kv, positions, layer)
        return self._attend(query, kv, positions, layer)

    def attended_positions(self, request: RequestPlan, layer_id: int) -> torch.Tensor | None:
        window = self.decode_window_of(request)
        if self._attends_to_everything(request, layer_id, window):
            return None
        return _positions(self._cached[request.req_pool_idx][layer_id], request, window)

    def _attends_to_everything(self, request: RequestPlan, layer_id: int, window: Window) -> bool:
        return layer_id in self.config.dense_layers or request.seq_len <= window.dense_len

    @property
    def lent_entries(self) -> int:
        return len(self._cached)

    def rope_of(self, layer_id: int) -> Rope | None:
        return self._ropes.get(layer_id)

    def _sample_mass(self, query: torch.Tensor, kv: RequestKV, positions: torch.Tensor, layer: LayerInput) -> None:
        window = self.config.window
        if (rope := self._ropes.get(layer.layer_id)) is not None:  # as it is scored
            query = rope.rotate(query.unsqueeze(0), torch.tensor([window.num_local], device=query.device))[0]
        is_chosen = torch.zeros(len(kv), dtype=torch.bool, device=query.device)
        is_chosen[positions] = True
        share = candidate_mass(
            query,
            layer.key_pool,
            kv.slots,
            is_chosen,
            num_sink=window.num_sink,
            num_local=window.num_local,
            scaling=layer.scaling * layer.k_scale,
            logit_cap=layer.logit_cap,
        )
        self.masses.append((share.item(), self.effort.level))

    def _selection(
        self, query: torch.Tensor, kv: RequestKV, layer: LayerInput, request: RequestPlan, window: Window
    ) -> CachedSelection:
        effort, rows = self.effort, self._cached.setdefault(request.req_pool_idx, {})
        cached = rows.get(layer.layer_id)
        if cached is not None and cached.serves(
            query,
            request.seq_len,
            window,
            theta=effort.theta,
            max_reuse=effort.max_reuse,
            sum_over_ranks=self._ranks.sum_,
        ):
            self.counters.reuses += window.budget > 0
            return cached
        rope = self._ropes.get(layer.layer_id)
        config = self.config
        ranked = select_for_query(query, kv, window, rope=rope, vote_scale=config.vote_scale, score=self._score)
        self.counters.votes += window.budget > 0
        rows[layer.layer_id] = CachedSelection(query.clone(), ranked, request.seq_len)
        return rows[layer.layer_id]

    def _extend(self, query: torch.Tensor, kv: RequestKV, layer: LayerInput, request: RequestPlan) -> torch.Tensor:
        config, start, end = self.config, request.prefix_len, request.prompt_end
        window = self.extend_window_of(request)
        is_dense = layer.layer_id in config.dense_layers
        sparse = end if is_dense else first_sparse_position(start, end, config.block, window)
        out = torch.empty_like(query)
        if sparse > start:
            out[: sparse - start] = self._attend(query[: sparse - start], kv, slice(0, sparse), layer)
        if sparse < end:
            candidates = self._block_candidates(kv, end)
            for lo, hi in cut_blocks(sparse, end, config.block):
                block = query[lo - start : hi - start]
                positions = self._block_positions(block, candidates, lo, hi, layer, window)
                out[lo - start : hi - start] = self._attend(block, kv, positions, layer)
        for position in range(end, request.seq_len):
            one = query[position - start : position - start + 1]
            out[position - start] = self._attend_alone(one, layer.request_kv(kv.slots[: position + 1]), layer, window)
        return out

    def _attend_alone(self, query: torch.Tensor, kv: RequestKV, layer: LayerInput, window: Window) -> torch.Tensor:
        """Of a token that was generated before a retraction, as in the decode step that read it."""
        if layer.layer_id in self.config.dense_layers or len(kv) <= window.dense_len:
            return self._attend(query, kv, slice(None), layer)
        rope, scale = self._ropes.get(layer.layer_id), self.config.vote_scale
        ranked = select_for_query(query[0], kv, window, rope=rope, vote_scale=scale, score=self._score)
        self.counters.block_votes += 1
        return self._attend(query, kv, window.positions(ranked, len(kv)), layer)

    def _block_candidates(self, kv: RequestKV, end: int) -> torch.Tensor:
        """Keys of the past from the sink on, gathered and widened once for all blocks of a request."""
        keys = kv.keys(slice(self.config.sink, end))
        return keys.to(torch.promote_types(keys.dtype, torch.float32))

    def _block_positions(
        self, query: torch.Tensor, candidates: torch.Tensor, lo: int, hi: int, layer: LayerInput, window: Window
    ) -> torch.Tensor:
        config = self.config
        ranked = select_for_block(
            query,
            candidates,
            lo,
            window,
            sub_block=config.queries_per_vote,
            combine=cast(Combine, config.combine),
            rope=self._ropes.get(layer.layer_id),
            vote_scale=config.vote_scale,
            score=self._score,
        )
        self.counters.block_votes += 1
        own = torch.arange(lo, hi, device=query.device)
        return torch.cat([window.positions(ranked, lo), own])

    def _attend(self, query: torch.Tensor, kv: RequestKV, positions, layer: LayerInput) -> torch.Tensor:
        rope = self._ropes.get(layer.layer_id)
        return attend_positions(query, kv, positions, scaling=layer.scaling, logit_cap=layer.logit_cap, rope=rope)


def _summed_score(score: Score, ranks: Ranks) -> Score:
    """`score`, added up over the ranks before anything is ranked or sub-blocks are combined."""

    def summed(query: torch.Tensor, keys: torch.Tensor, *, vote_scale: float = 1.0) -> torch.Tensor:
        return ranks.sum_(score(query, keys, vote_scale=vote_scale).contiguous())

    return score if ranks.world_size == 1 else summed


def _positions(selection: CachedSelection, request: RequestPlan, window: Window) -> torch.Tensor:
    """What a decode query attends to by a selection, of this step or of one before."""
    return window.positions(selection.ranked, request.seq_len, age=request.seq_len - selection.seq_len)
