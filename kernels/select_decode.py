# SPDX-License-Identifier: Apache-2.0
"""Selection for a batch of decode queries: the launches of one layer, in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from .checks import expect
from .decode_score import score_decode
from .emit import emit
from .paged_keys import PagedKeys
from .rows import SelectionRows
from .selection_cache import DecodeBatch, Probe, SelectionCache, begin_decode
from .shared_plan import SharedPrefixes
from .shared_prefix import plan_chunks, score_shared
from .vote import vote
from .vote_exchange import VoteExchange, sum_votes
from .workspace import MAX_SHARED_KV_HEADS, DecodeWorkspace


@dataclass(frozen=True)
class DecodePart:
    """Rows that are scored at once.

    Attributes:
        rows: indices of neighbours in the batch, one at least; `DecodeWorkspace.cut_rows` tells which the workspace
            holds.
        shared: which of their tiles they score together, rows counted from the first of the part; None: none.
    """

    rows: range
    shared: SharedPrefixes | None = None


def select_decode(
    query: torch.Tensor,
    keys: PagedKeys,
    batch: DecodeBatch,
    cache: SelectionCache,
    rows: SelectionRows,
    workspace: DecodeWorkspace,
    kv_indices: torch.Tensor,
    *,
    num_sink: int,
    num_local: int,
    vote_scale: float = 1.0,
    parts: Sequence[DecodePart] | None = None,
    layer: int = 0,
    exchange: VoteExchange | None = None,
) -> None:
    """Writes the slots that each query of a decode step attends to in one layer.

    No host sync and no allocation: a CUDA graph of this call stays right when lengths, budgets,
    slots and cache contents change (spec, "Selection for one decode query", "Selection cache").

    Args:
        query: [num_rows, num_qo_heads, head_dim], dtype of the keys (bfloat16 or float16 with float8 keys),
            heads contiguous; rotated as it is to be scored.
        batch: who asks; `batch.kv_indptr` says where each row's slots go. Of a row with budget -1 nothing is written.
        cache: of this layer. Rows with a cache slot reuse its vote, or leave theirs.
        kv_indices: [>= kv_indptr[-1]] int32, written: sink, chosen and local slots, ascending in position.
        parts: what the workspace holds one after the other, all rows together; None: it holds all of them at once.
        layer: index of this layer among those that select: it leaves its queries in `batch.probe` if that wants them.
        exchange: the heads are those of one rank, and all ranks choose together; None: they choose for themselves.

    Raises:
        ValueError: shapes or dtypes that do not fit each other or the workspace.
    """
    _check(query, keys, batch, cache, workspace, kv_indices)
    if layer < 0:
        raise ValueError(f"layer: expected 0 at least, got {layer}")
    parts = (DecodePart(range(len(batch))),) if parts is None else parts
    for part in parts:
        if part.shared is not None:
            _check_shared(part.shared, len(part.rows), keys, vote_scale)
    begin_decode(
        query, batch, cache, rows, workspace, num_sink=num_sink, num_local=num_local, layer=layer, exchange=exchange
    )
    for part in parts:
        first, stop, count = part.rows.start, part.rows.stop, len(part.rows)
        part_query, part_rows, req_pool_indices = (
            query[first:stop],
            rows.of(part.rows),
            batch.req_pool_indices[first:stop],
        )
        shared, scored = part.shared, dict[str, Any](num_sink=num_sink, vote_scale=vote_scale)
        shared_tiles = shared.shared_tiles if shared else None
        if shared:
            plan_chunks(req_pool_indices, part_rows, shared, workspace)
        score_decode(part_query, keys, req_pool_indices, part_rows, workspace, shared_tiles=shared_tiles, **scored)
        if shared:
            score_shared(part_query, keys, part_rows, shared, workspace, **scored)
        vote(
            part_rows,
            count,
            workspace,
            shared_tiles=shared_tiles,
            lse=workspace.lse if shared else None,
            exchange=exchange,
        )
        if exchange is not None:
            sum_votes(part_rows, count, workspace, exchange)
        emit(
            keys.req_to_token,
            req_pool_indices,
            part_rows,
            count,
            workspace,
            batch.kv_indptr[first:stop],
            kv_indices,
            num_sink=num_sink,
            cache=cache,
            cache_slots=batch.cache_slots[first:stop],
        )


def _check(
    query: torch.Tensor,
    keys: PagedKeys,
    batch: DecodeBatch,
    cache: SelectionCache,
    workspace: DecodeWorkspace,
    kv_indices: torch.Tensor,
) -> None:
    limits = workspace.limits
    expected = (len(batch), workspace.num_qo_heads, keys.head_dim)
    if tuple(query.shape) != expected or query.stride()[1:] != (keys.head_dim, 1):
        raise ValueError(
            f"query: expected {expected} with contiguous heads, got {tuple(query.shape)}, {query.stride()}"
        )
    if query.dtype not in keys.query_dtypes:
        expected_dtypes = " or ".join(map(str, keys.query_dtypes))
        raise ValueError(f"query.dtype: expected {expected_dtypes} for these keys, got {query.dtype}")
    if keys.num_kv_heads != workspace.num_kv_heads:
        raise ValueError(f"num_kv_heads: expected {workspace.num_kv_heads}, the workspace's, got {keys.num_kv_heads}")
    if cache.vote.shape[1] != limits.max_budget:
        raise ValueError(
            f"cache.vote: expected {limits.max_budget} members, the workspace's, got {cache.vote.shape[1]}"
        )
    if len(batch) > limits.max_rows:
        raise ValueError(f"num_rows: expected at most {limits.max_rows}, the workspace's, got {len(batch)}")
    expect("kv_indices", kv_indices, (None,), torch.int32)
    if batch.probe is not None:
        _check_probe(batch.probe, query)


def _check_shared(shared: SharedPrefixes, num_rows: int, keys: PagedKeys, vote_scale: float) -> None:
    if keys.num_kv_heads > MAX_SHARED_KV_HEADS:
        raise ValueError(
            f"num_kv_heads: expected at most {MAX_SHARED_KV_HEADS} where rows share tiles, got {keys.num_kv_heads}"
        )
    if len(shared.segment) != num_rows:
        raise ValueError(f"parts: expected shared tiles of {num_rows} rows, got {len(shared.segment)}")
    if not keys.logit_scale(vote_scale) > 0:
        raise ValueError(f"vote_scale: expected more than 0 where rows share tiles, got {vote_scale}")


def _check_probe(probe: Probe, query: torch.Tensor) -> None:
    num_rows, size = query.shape[0], query.shape[1] * query.shape[2]
    expect("probe.layer", probe.layer, (1,), torch.int32)
    expect("probe.query", probe.query, (None, size), query.dtype)
    if probe.query.shape[0] < num_rows:
        raise ValueError(f"probe.query: expected {num_rows} rows at least, got {probe.query.shape[0]}")
    if not probe.query.is_contiguous():
        raise ValueError(f"probe.query: expected contiguous rows, got strides {probe.query.stride()}")
