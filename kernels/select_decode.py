# SPDX-License-Identifier: Apache-2.0
"""Selection for a batch of decode queries: the launches of one layer, in order."""

from __future__ import annotations

import torch

from .checks import expect
from .decode_score import score_decode
from .emit import emit
from .paged_keys import PagedKeys
from .rows import SelectionRows
from .selection_cache import DecodeBatch, Probe, SelectionCache, begin_decode
from .vote import vote
from .workspace import DecodeWorkspace


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
    num_parts: int | None = None,
    layer: int = 0,
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
        num_parts: how many parts to run: `WorkspaceLimits.count_parts` of the candidates that the rows may have, or
            more; None: as many as any batch needs. Rows of parts that are not run get no slots.
        layer: index of this layer among those that select: it leaves its queries in `batch.probe` if that wants them.

    Raises:
        ValueError: shapes or dtypes that do not fit each other or the workspace, or no parts.
    """
    _check(query, keys, batch, cache, workspace, kv_indices)
    num_rows = len(batch)
    if num_parts is None:
        num_parts = workspace.limits.num_parts(num_rows)
    if layer < 0:
        raise ValueError(f"layer: expected 0 at least, got {layer}")
    if num_parts < 1:
        raise ValueError(f"num_parts: expected 1 at least, got {num_parts}")
    begin_decode(query, batch, cache, rows, workspace, num_sink=num_sink, num_local=num_local, layer=layer)
    for part in range(num_parts):
        score_decode(
            query, keys, batch.req_pool_indices, rows, workspace, num_sink=num_sink, vote_scale=vote_scale, part=part
        )
        vote(rows, num_rows, workspace, part=part)
        emit(
            keys.req_to_token,
            batch.req_pool_indices,
            rows,
            num_rows,
            workspace,
            batch.kv_indptr,
            kv_indices,
            num_sink=num_sink,
            cache=cache,
            cache_slots=batch.cache_slots,
            part=part,
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


def _check_probe(probe: Probe, query: torch.Tensor) -> None:
    num_rows, size = query.shape[0], query.shape[1] * query.shape[2]
    expect("probe.layer", probe.layer, (1,), torch.int32)
    expect("probe.query", probe.query, (None, size), query.dtype)
    if probe.query.shape[0] < num_rows:
        raise ValueError(f"probe.query: expected {num_rows} rows at least, got {probe.query.shape[0]}")
    if not probe.query.is_contiguous():
        raise ValueError(f"probe.query: expected contiguous rows, got strides {probe.query.stride()}")
