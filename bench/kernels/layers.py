# SPDX-License-Identifier: Apache-2.0
"""Layers of a model for the benchmark: each with keys, values, queries and a selection cache of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_tokenselect.kernels.emit import emit
from sglang_tokenselect.kernels.paged_keys import PagedKeys
from sglang_tokenselect.kernels.reference.vote import soft_vote
from sglang_tokenselect.kernels.reference.window import Window
from sglang_tokenselect.kernels.rows import SelectionRows
from sglang_tokenselect.kernels.select_decode import DecodePart, select_decode
from sglang_tokenselect.kernels.selection_cache import DecodeBatch, SelectionCache
from sglang_tokenselect.kernels.shared_plan import SharedPlan, SharedPrefixes
from sglang_tokenselect.kernels.shared_segment import SharedSegment
from sglang_tokenselect.kernels.vote_exchange import VoteExchange
from sglang_tokenselect.kernels.workspace import DecodeWorkspace, WorkspaceLimits

WINDOW = Window(num_sink=128, budget=2048, num_local=512)
HEAD_DIM = 128
DTYPE = torch.bfloat16
ROOM = 64  # tokens that a request may grow by


@dataclass(frozen=True)
class Shape:
    """Requests of equal length, the heads of the model, and how many first tokens the requests have in common."""

    requests: int
    context: int
    num_qo_heads: int = 32
    num_kv_heads: int = 8
    shared: int = 0

    @property
    def num_slots(self) -> int:
        """With room for each request to grow."""
        return self.shared + self.requests * (self.context - self.shared + ROOM)

    @property
    def key_bytes(self) -> int:
        """Of all tokens, those that requests have in common once."""
        tokens = self.shared + self.requests * (self.context - self.shared)
        return tokens * self.num_kv_heads * HEAD_DIM * DTYPE.itemsize

    @property
    def columns(self) -> dict[str, object]:
        heads = f"{self.num_qo_heads}/{self.num_kv_heads} d{HEAD_DIM}"
        return {"requests": self.requests, "context": self.context, "shared": self.shared, "heads": heads}


class Layer:
    """Random keys, values and queries; slots in random order, the worst that a pool comes to."""

    def __init__(
        self,
        shape: Shape,
        *,
        values: bool = False,
        num_queries: int | None = None,
        keys: PagedKeys | None = None,
    ) -> None:
        """
        Args:
            keys: those of another layer, for a layer that reads none.
        """
        size = (shape.num_slots, shape.num_kv_heads, HEAD_DIM)
        if keys is None:
            order = torch.randperm(shape.num_slots, device="cuda").to(torch.int32)
            shared, own = order[: shape.shared], order[shape.shared :].view(shape.requests, -1)
            table = torch.cat((shared.expand(shape.requests, -1), own), 1)
            keys = PagedKeys(torch.randn(size, device="cuda", dtype=DTYPE), table)
        self.keys, self.table = keys, keys.req_to_token
        self.values = torch.randn(size, device="cuda", dtype=DTYPE) if values else None
        self.query = torch.randn(
            num_queries or shape.requests, shape.num_qo_heads, HEAD_DIM, device="cuda", dtype=DTYPE
        )
        # Logits of standard deviation 3: votes are neither flat nor all on one token.
        self.query *= 3 / HEAD_DIM**0.5


class DecodeLayers:
    """What a server keeps for the decode steps of some layers."""

    def __init__(self, shape: Shape, num_layers: int, *, values: bool = False, share_keys: bool = False) -> None:
        self.shape = shape
        self.layers = [Layer(shape, values=values)]
        keys = self.layers[0].keys if share_keys else None
        self.layers += [Layer(shape, values=values, keys=keys) for _ in range(num_layers - 1)]
        limits = WorkspaceLimits(
            shape.requests, shape.requests * (shape.context + ROOM), shape.context + ROOM, WINDOW.budget
        )
        self.workspace = DecodeWorkspace(limits, shape.num_qo_heads, shape.num_kv_heads, "cuda")
        attended = WINDOW.attended_length(shape.context)
        steps = torch.arange(shape.requests + 1, device="cuda", dtype=torch.int32)
        self.batch = DecodeBatch(
            req_pool_indices=steps[:-1].long(),
            seq_lens=torch.full((shape.requests,), shape.context, device="cuda"),
            budgets=torch.full((shape.requests,), WINDOW.budget, device="cuda", dtype=torch.int32),
            cache_slots=steps[:-1].clone(),
            kv_indptr=steps * attended,
            theta=torch.tensor([2.0], device="cuda"),
            max_reuse=torch.tensor([ROOM], device="cuda", dtype=torch.int32),
        )
        size = shape.num_qo_heads * HEAD_DIM
        self.caches = [SelectionCache.create(shape.requests, size, WINDOW.budget, DTYPE, "cuda") for _ in self.layers]
        self.rows = SelectionRows.empty(shape.requests, "cuda")
        self.kv_indices = torch.empty(shape.requests * attended, dtype=torch.int32, device="cuda")
        self.parts: tuple[DecodePart, ...] | None = None
        self.exchange: VoteExchange | None = None

    def share(self) -> None:
        """From now on, what the requests have in common is scored once for all."""
        requests = self.shape.requests
        segments = [SharedSegment(tuple(range(requests)), 0, self.shape.shared)]
        candidates = [self.shape.context - WINDOW.num_sink - WINDOW.num_local] * requests
        plan = SharedPlan.of(segments, candidates, num_sink=WINDOW.num_sink, min_rows=1)
        memory = torch.zeros(SharedPrefixes.count_ints(requests), dtype=torch.int32)
        plan.write(memory)
        self.parts = (DecodePart(range(requests), SharedPrefixes.view(memory.cuda(), requests)),)

    def select(self, index: int) -> None:
        layer = self.layers[index]
        select_decode(
            layer.query,
            layer.keys,
            self.batch,
            self.caches[index],
            self.rows,
            self.workspace,
            self.kv_indices,
            num_sink=WINDOW.num_sink,
            num_local=WINDOW.num_local,
            parts=self.parts,
            exchange=self.exchange,
        )

    def emit(self, **cache: object) -> None:
        """The last launch of the first layer alone."""
        emit(
            self.layers[0].table,
            self.batch.req_pool_indices,
            self.rows,
            len(self.batch),
            self.workspace,
            self.batch.kv_indptr,
            self.kv_indices,
            num_sink=WINDOW.num_sink,
            **cache,
        )

    def check(self) -> None:
        """Raises unless the first layer selects what float64 does, up to ties within 1%; before any timing."""
        self.select(0)
        layer, n = self.layers[0], self.shape.context
        for row, slots in enumerate(self.kv_indices.view(self.shape.requests, -1)):
            position_of = torch.full((self.shape.num_slots,), -1, device="cuda", dtype=torch.int32)
            position_of[layer.table[row].long()] = torch.arange(n + ROOM, device="cuda", dtype=torch.int32)
            positions = position_of[slots.long()]
            if (positions.diff() <= 0).any() or positions[0] != 0 or positions[-1] != n - 1:
                raise AssertionError(f"{self.shape}: slots are not in ascending position")
            check_votes(layer, row, slice(WINDOW.num_sink, n - WINDOW.num_local), layer.query[row : row + 1], positions)


def check_votes(
    layer: Layer, row: int, candidates: slice, query: torch.Tensor, positions: torch.Tensor, *, rtol: float = 0.01
) -> None:
    """Raises unless the chosen among ``positions`` have the best float64 scores, up to ties within ``rtol``.

    Args:
        query: [rows that vote, num_qo_heads, head_dim]; the score is the largest of their votes.
        positions: all that is attended to, ascending.
    """
    keys = layer.keys.pool[layer.table[row, candidates].long()]
    score = soft_vote(query.double(), keys.double()).amax(0)
    chosen = positions[WINDOW.num_sink : WINDOW.num_sink + WINDOW.budget].long() - WINDOW.num_sink
    lowest = score.topk(WINDOW.budget).values.min()
    if score[chosen].min() < lowest * (1 - rtol):
        raise AssertionError(f"chosen {score[chosen].min():.3e}, expected {lowest:.3e} at least")
