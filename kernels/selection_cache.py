# SPDX-License-Identifier: Apache-2.0
"""The selection cache on the device: which decode rows reuse an earlier vote (paper, section 3.3).

`reference/cache.py` is the twin. An entry keeps its vote as keys whose order is the order of the vote,
so the best ``b`` members are found without scoring, for any smaller budget ``b`` and any age.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
import triton
import triton.language as tl

from .launch import start_next, wait_for_previous
from .rows import SelectionRows
from .vote_exchange import MESSAGE, VoteExchange, sum_over_ranks
from .workspace import Workspace


@dataclass(frozen=True)
class SelectionCache:
    """Entries of one layer, one for each cache slot.

    Attributes:
        query: [num_slots, num_qo_heads * head_dim], dtype of the queries: those that voted.
        vote: [num_slots, max_budget] int64, members in ascending position, each as
            ``(bits of its float32 score << 32) | (2**31 - 1 - candidate)``.
        vote_len: [num_slots] int32, members of the vote.
        seq_len: [num_slots] int32, tokens of the request when it voted; 0: no vote.
        cut: [num_slots] int64, the least key that was attended to last. It moves by one member in a step.
        counters: [2] int64, votes reused and votes made.
    """

    query: torch.Tensor
    vote: torch.Tensor
    vote_len: torch.Tensor
    seq_len: torch.Tensor
    cut: torch.Tensor
    counters: torch.Tensor

    @classmethod
    def create(
        cls,
        num_slots: int,
        query_size: int,
        max_budget: int,
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        layers: tuple[int, ...] = (),
    ) -> SelectionCache:
        """Empty entries: ``query_size * itemsize + 8 * max_budget + 16`` bytes each.

        Args:
            layers: sizes that each tensor has before its own, for :class:`SelectionCaches`.
        """
        slots = (*layers, num_slots)
        return cls(
            query=torch.empty(*slots, query_size, dtype=dtype, device=device),
            vote=torch.empty(*slots, max_budget, dtype=torch.int64, device=device),
            vote_len=torch.zeros(slots, dtype=torch.int32, device=device),
            seq_len=torch.zeros(slots, dtype=torch.int32, device=device),
            cut=torch.zeros(slots, dtype=torch.int64, device=device),
            counters=torch.zeros(*layers, 2, dtype=torch.int64, device=device),
        )


class SelectionCaches:
    """The entries of all layers, in one tensor for each attribute of :class:`SelectionCache`.

    Attributes:
        seq_len: [num_layers, num_slots] int32; 0: no vote.
        counters: [num_layers, 2] int64, votes reused and votes made.
    """

    def __init__(self, stacked: SelectionCache) -> None:
        """
        Args:
            stacked: tensors with a first dimension of num_layers.
        """
        self.seq_len, self.counters = stacked.seq_len, stacked.counters
        columns = (getattr(stacked, field.name) for field in fields(stacked))
        self._layers = tuple(SelectionCache(*tensors) for tensors in zip(*columns, strict=True))

    @classmethod
    def create(
        cls,
        num_layers: int,
        num_slots: int,
        query_size: int,
        max_budget: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> SelectionCaches:
        """Empty entries. With no slots, every row of a batch must have cache slot -1."""
        return cls(SelectionCache.create(num_slots, query_size, max_budget, dtype, device, layers=(num_layers,)))

    def layer(self, index: int) -> SelectionCache:
        """The entries of one layer, views of these."""
        return self._layers[index]

    def forget(self, slots: torch.Tensor) -> None:
        """Ends what these slots hold in every layer. No host sync.

        Args:
            slots: [any] int64 on the device, 0 to num_slots - 1.
        """
        self.seq_len.index_fill_(1, slots, 0)


@dataclass(frozen=True)
class Probe:
    """Where one layer leaves the queries of a step. Which layer is said on the device: graphs read it anew.

    Attributes:
        layer: [1] int32, index of the layer whose queries are kept, counted among those that select; -1: none.
        query: [max_rows, num_qo_heads * head_dim], dtype of the queries, contiguous: those of the last step that
            kept any, as they were scored. Rows beyond that step's are older or never written.
    """

    layer: torch.Tensor
    query: torch.Tensor


@dataclass(frozen=True)
class DecodeBatch:
    """The requests of one decode step. All tensors are on the device; graphs rewrite them in place.

    Attributes:
        req_pool_indices: [num_rows] int32 or int64, row of `req_to_token` of each request.
        seq_lens: [num_rows] int32 or int64, cached tokens, that of this step included.
        budgets: [num_rows] int32, tokens to choose; -1: the row attends to everything, and the caller has written
            its slots, once for all layers. Nothing is written for such a row and its cache entry is not touched.
        cache_slots: [num_rows] int32, entry of the selection cache; -1: none, votes every step.
        kv_indptr: [num_rows + 1] int32, where each row's slots go; a row needs
            ``min(seq_len, num_sink + budget + num_local)`` of them, with budget -1 ``seq_len``.
        theta: [1] float32, least cosine for reuse. Above 1: never; -1: always.
        max_reuse: [1] int32, steps that one vote may serve, its own included.
        probe: where the queries of one layer are kept; None: nowhere.
    """

    req_pool_indices: torch.Tensor
    seq_lens: torch.Tensor
    budgets: torch.Tensor
    cache_slots: torch.Tensor
    kv_indptr: torch.Tensor
    theta: torch.Tensor
    max_reuse: torch.Tensor
    probe: Probe | None = None

    def __len__(self) -> int:
        return self.seq_lens.shape[0]


# Layers' views of stacked entries are not aligned alike, nor are the numbers of a step that lie in one buffer.
@triton.jit(
    do_not_specialize=["layer", "rank"],
    do_not_specialize_on_alignment=[
        "theta_ptr",
        "max_reuse_ptr",
        "probe_layer_ptr",
        "cached_vote_len_ptr",
        "cached_seq_len_ptr",
    ],
)
def _begin_decode_kernel(
    query_ptr,
    seq_lens_ptr,
    budgets_ptr,
    cache_slots_ptr,
    theta_ptr,
    max_reuse_ptr,
    probe_layer_ptr,
    probe_query_ptr,
    cached_query_ptr,
    cached_vote_len_ptr,
    cached_seq_len_ptr,
    counters_ptr,
    num_candidates_ptr,
    num_chosen_ptr,
    tail_start_ptr,
    kv_end_ptr,
    cached_ptr,
    memories_ptr,
    sent_ptr,
    num_sink,
    num_local,
    layer,
    rank,
    first_message,
    max_rows,
    stride_query_row,
    WORLD: tl.constexpr,
    MESSAGE: tl.constexpr,
    HAS_PROBE: tl.constexpr,
    QUERY_SIZE: tl.constexpr,
    QUERY_BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    start_next(PDL)
    row = tl.program_id(0)
    budget = tl.load(budgets_ptr + row)
    # Of a row that the caller writes, nothing is left: a request of no tokens.
    seq_len = tl.where(budget < 0, 0, tl.load(seq_lens_ptr + row).to(tl.int32))
    budget = tl.maximum(budget, 0)
    slot = tl.load(cache_slots_ptr + row).to(tl.int64)
    # [QUERY_BLOCK]
    offs = tl.arange(0, QUERY_BLOCK)
    inside = offs < QUERY_SIZE
    query = tl.load(query_ptr + row.to(tl.int64) * stride_query_row + offs, mask=inside, other=0)
    if HAS_PROBE:
        wanted = tl.load(probe_layer_ptr)
        if wanted == layer:
            tl.store(probe_query_ptr + row.to(tl.int64) * QUERY_SIZE + offs, query, mask=inside)
    tail_start = tl.minimum(seq_len, num_sink)
    num_chosen = 0
    num_candidates = 0
    cached = 0
    if seq_len > num_sink + budget + num_local:
        tail_start = seq_len - num_local
        num_chosen = budget
        if slot >= 0:
            voter = tl.load(cached_query_ptr + slot * QUERY_SIZE + offs, mask=inside, other=0).to(tl.float32)
            wide = query.to(tl.float32)
            dot, norm, voter_norm = tl.sum(wide * voter), tl.sum(wide * wide), tl.sum(voter * voter)
            vote_seq_len = tl.load(cached_seq_len_ptr + slot)
            age = seq_len - vote_seq_len
            fits = (age <= budget) & (budget - age <= tl.load(cached_vote_len_ptr + slot))
            young = (vote_seq_len > 0) & (age >= 0) & (age < tl.load(max_reuse_ptr))
            # Else the entry may hold anything, NaN included, and there is nothing to ask other ranks.
            if fits & young:
                if WORLD > 1:
                    dot, norm, voter_norm = sum_over_ranks(
                        dot,
                        norm,
                        voter_norm,
                        row,
                        memories_ptr,
                        sent_ptr,
                        rank,
                        first_message,
                        max_rows,
                        WORLD,
                        MESSAGE,
                    )
                norm = tl.sqrt(norm) * tl.sqrt(voter_norm)
                cached = (dot >= tl.load(theta_ptr) * tl.maximum(norm, 1e-30)).to(tl.int32)
            if cached > 0:
                # The local window grows by what came since the vote, and the vote gives up as many.
                tail_start -= age
                num_chosen -= age
            else:
                tl.store(cached_query_ptr + slot * QUERY_SIZE + offs, query, mask=inside)
                tl.store(cached_vote_len_ptr + slot, budget)
                tl.store(cached_seq_len_ptr + slot, seq_len)
        if (cached == 0) & (num_chosen > 0):
            num_candidates = seq_len - num_local - num_sink
    tl.store(num_candidates_ptr + row, num_candidates)
    tl.store(num_chosen_ptr + row, num_chosen)
    tl.store(tail_start_ptr + row, tail_start)
    tl.store(kv_end_ptr + row, seq_len)
    tl.store(cached_ptr + row, cached)

    if (cached > 0) | (num_candidates > 0):
        tl.atomic_add(counters_ptr + 1 - cached, 1, sem="relaxed")


def begin_decode(
    query: torch.Tensor,
    batch: DecodeBatch,
    cache: SelectionCache,
    rows: SelectionRows,
    workspace: Workspace,
    *,
    num_sink: int,
    num_local: int,
    layer: int = 0,
    exchange: VoteExchange | None = None,
) -> None:
    """Decides for each row: everything, an earlier vote, or a new vote; one launch, no host sync.

    A row whose request fits its window attends to everything; one with budget -1 does too, but gets no candidates,
    sink or tail, since the caller writes its slots. A row reuses its cached vote if the
    cosine over all heads reaches ``theta`` and the vote is younger than ``max_reuse`` and holds enough
    members. Else it votes: its entry takes the query and length now, and the vote when it is known.

    Args:
        query: [num_rows, num_qo_heads, head_dim], heads contiguous.
        rows: filled for :func:`score_decode`, :func:`vote` and :func:`emit`.
        layer: which this is. The layer that `batch.probe` names leaves there the queries of all rows, also of those
            that attend to everything.
        exchange: with the other ranks, since the cosine is over all heads; None: these are all that decide.
    """
    probe = batch.probe
    num_rows, query_size = len(batch), query.shape[1] * query.shape[2]
    _begin_decode_kernel[(num_rows,)](
        query,
        batch.seq_lens,
        batch.budgets,
        batch.cache_slots,
        batch.theta,
        batch.max_reuse,
        probe.layer if probe else None,
        probe.query if probe else None,
        cache.query,
        cache.vote_len,
        cache.seq_len,
        cache.counters,
        rows.num_candidates,
        rows.num_chosen,
        rows.tail_start,
        rows.kv_end,
        rows.cached,
        exchange.addresses if exchange else None,
        exchange.sent if exchange else None,
        num_sink,
        num_local,
        layer,
        exchange.rank if exchange else 0,
        exchange.layout.first_message if exchange else 0,
        exchange.layout.max_rows if exchange else 0,
        query.stride(0),
        WORLD=exchange.layout.world_size if exchange else 1,
        MESSAGE=MESSAGE,
        HAS_PROBE=probe is not None,
        QUERY_SIZE=query_size,
        QUERY_BLOCK=triton.next_power_of_2(query_size),
        PDL=workspace.pdl,
        launch_pdl=workspace.pdl,
        num_warps=8,
    )
