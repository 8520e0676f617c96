# SPDX-License-Identifier: Apache-2.0
"""Other people's kernels, prepared so that only their launches are timed.

Each function plans and allocates, and returns a capturable call that returns its result; or None, with the
reason printed once, where the peer is not installed or does not take the problem. Pools have page size 1.

FlashInfer loads a prebuilt module where one matches and else compiles for minutes, so the attention peers
fix what its name depends on: bfloat16 queries, keys, values and outputs, int32 indices, no window, no cap.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Literal

import torch

Step = Callable[[], torch.Tensor]

WORKSPACE_BYTES = 512 * 2**20  # FlashInfer's partial results, for up to 8,192 queries in blocks
MAX_TIE_BREAK_K = 2048  # flashinfer topk.cuh, FILTERED_TOPK_MAX_K
SGL_TOPK = 2048  # fixed when sgl_kernel is compiled


@functools.cache
def available(package: str) -> bool:
    """Whether a peer's package can be imported here."""
    try:
        importlib.import_module(package)
    except (ImportError, OSError, RuntimeError) as error:
        _left_out(package, f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
        return False
    return True


def flashinfer_decode(
    query: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
) -> Step | None:
    """Exact decode attention on FlashInfer's tensor-core path, planned as a server plans it for a graph.

    Args:
        query: [requests, num_qo_heads, head_dim] bfloat16.
        key_pool: [num_slots, num_kv_heads, head_dim] bfloat16; ``value_pool`` likewise.
        kv_indptr: [requests + 1] int32 on the CPU.
        kv_indices: [kv_indptr[-1]] int32 slots on the GPU. Read at each call, so it may be rewritten in place.

    Returns:
        A call that returns [requests, num_qo_heads, head_dim].
    """
    if not available("flashinfer"):
        return None
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    _check_attention(query, key_pool, kv_indptr, kv_indices)
    requests, num_qo_heads, head_dim = query.shape
    last_page_len = torch.ones(requests, dtype=torch.int32)
    wrapper = BatchDecodeWithPagedKVCacheWrapper(
        _workspace(query.device),
        "NHD",
        use_cuda_graph=True,
        use_tensor_cores=True,
        paged_kv_indptr_buffer=kv_indptr.to(query.device),
        paged_kv_indices_buffer=kv_indices,
        paged_kv_last_page_len_buffer=last_page_len.to(query.device),
    )
    wrapper.plan(
        kv_indptr,
        kv_indices,
        last_page_len,
        num_qo_heads,
        key_pool.shape[1],
        head_dim,
        1,
        q_data_type=torch.bfloat16,
    )
    out = torch.empty_like(query)
    return lambda: wrapper.run(query, (key_pool, value_pool), out=out)


def flashinfer_prefill(
    query: torch.Tensor,
    key_pool: torch.Tensor,
    value_pool: torch.Tensor,
    kv_indptr: torch.Tensor,
    kv_indices: torch.Tensor,
    *,
    qo_indptr: torch.Tensor | None = None,
    causal: bool = True,
    backend: Literal["fa2", "fa3"] = "fa2",
) -> Step | None:
    """Exact attention of queries that are the last tokens of their requests.

    Args:
        query: [num_queries, num_qo_heads, head_dim] bfloat16.
        key_pool: [num_slots, num_kv_heads, head_dim] bfloat16; ``value_pool`` likewise.
        kv_indptr: [requests + 1] int32 on the CPU; the queries' own tokens are counted.
        kv_indices: [kv_indptr[-1]] int32 slots on the GPU. Read at each call, so it may be rewritten in place.
        qo_indptr: [requests + 1] int32 on the CPU; None: all queries are one request's.

    Returns:
        A call that returns [num_queries, num_qo_heads, head_dim].
    """
    if not available("flashinfer"):
        return None
    from flashinfer import BatchPrefillWithPagedKVCacheWrapper

    _check_attention(query, key_pool, kv_indptr, kv_indices)
    num_queries, num_qo_heads, head_dim = query.shape
    if qo_indptr is None:
        qo_indptr = torch.tensor([0, num_queries], dtype=torch.int32)
    wrapper = BatchPrefillWithPagedKVCacheWrapper(_workspace(query.device), "NHD", backend=backend)
    wrapper.plan(
        qo_indptr,
        kv_indptr,
        kv_indices,
        torch.ones(len(kv_indptr) - 1, dtype=torch.int32),
        num_qo_heads,
        key_pool.shape[1],
        head_dim,
        1,
        causal=causal,
        q_data_type=torch.bfloat16,
    )
    out = torch.empty_like(query)
    return lambda: wrapper.run(query, (key_pool, value_pool), out=out)


def torch_topk(scores: torch.Tensor, k: int) -> Step:
    """``torch.topk``, unsorted. Returns a call that returns [rows, k] int64 positions."""
    return lambda: torch.topk(scores, k, sorted=False).indices


def flashinfer_topk(scores: torch.Tensor, k: int) -> Step | None:
    """``flashinfer.top_k`` at its defaults: unsorted, ties in no stated order.

    Args:
        scores: [rows, n] float32, contiguous.

    Returns:
        A call that returns [rows, k] int64 positions.
    """
    if not available("flashinfer"):
        return None
    import flashinfer

    return lambda: flashinfer.top_k(scores, k)[1]


def flashinfer_topk_page_table(
    scores: torch.Tensor,
    page_table: torch.Tensor,
    lengths: torch.Tensor,
    k: int,
    row_to_batch: torch.Tensor,
    *,
    row_starts: torch.Tensor | None = None,
    deterministic: bool = True,
) -> Step | None:
    """FlashInfer's top-k that looks the chosen positions up in a page table.

    Args:
        scores: [rows, n] float32, contiguous.
        page_table: [requests, max_len] int32, contiguous: ``req_to_token``.
        lengths: [rows] int32, how many scores of a row count.
        row_to_batch: [rows] int32, each row's row of ``page_table``.
        row_starts: [rows] int32, the first column that counts, in scores and page table; None: 0.
        deterministic: our contract (ties to the lower position, slots in ascending position); False:
            FlashInfer's defaults, which keep neither.

    Returns:
        A call that returns [rows, k] int32 slots.
    """
    if not available("flashinfer"):
        return None
    if deterministic and k > MAX_TIE_BREAK_K:
        return _left_out("flashinfer top_k_page_table_transform", f"k {k} is over {MAX_TIE_BREAK_K} with a tie order")
    # FlashInfer 0.6.15 takes these pointers without looking at the dtype.
    for name, tensor in (("lengths", lengths), ("row_to_batch", row_to_batch), ("page_table", page_table)):
        _check_dtype(name, tensor, torch.int32)
    import flashinfer

    tie_break = flashinfer.TopKTieBreak.SMALL if deterministic else flashinfer.TopKTieBreak.NONE
    return lambda: flashinfer.top_k_page_table_transform(
        scores,
        page_table,
        lengths,
        k,
        row_to_batch=row_to_batch,
        deterministic=deterministic,
        tie_break=tie_break,
        row_starts=row_starts,
    )


def sgl_fast_topk(scores: torch.Tensor, lengths: torch.Tensor, k: int = SGL_TOPK) -> Step | None:
    """``sgl_kernel``'s top-k: unsorted, one block of threads per row, ties in no stated order.

    It drops candidates where more than 16,384 fall into one coarse bin, so its set can be wrong on flat scores.

    Args:
        scores: [rows, n] float32.
        lengths: [rows] int32, how many scores of a row count.

    Returns:
        A call that returns [rows, k] int32 positions, -1 where a row is shorter than k.
    """
    if not available("sgl_kernel"):
        return None
    if k != SGL_TOPK:
        return _left_out("sgl_kernel fast_topk_v2", f"it has no k but {SGL_TOPK}, asked for {k}")
    _check_dtype("lengths", lengths, torch.int32)
    from sgl_kernel.top_k import fast_topk_v2

    return lambda: fast_topk_v2(scores, lengths, k)


@functools.cache
def _left_out(peer: str, reason: str) -> None:
    # Cached, so that each reason is printed once.
    print(f"note: {peer} is left out: {reason}")


@functools.cache
def _workspace(device: torch.device) -> torch.Tensor:
    # One for all peers, since their calls follow one another on one stream. Zeroed, as FlashInfer asks.
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


def _check_attention(
    query: torch.Tensor, key_pool: torch.Tensor, kv_indptr: torch.Tensor, kv_indices: torch.Tensor
) -> None:
    _check_dtype("query", query, torch.bfloat16)
    _check_dtype("key_pool", key_pool, torch.bfloat16)
    _check_dtype("kv_indptr", kv_indptr, torch.int32)
    _check_dtype("kv_indices", kv_indices, torch.int32)
    if kv_indptr.is_cuda:
        raise ValueError("kv_indptr: expected a CPU tensor, got one on the GPU")


def _check_dtype(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise ValueError(f"{name}: expected {dtype}, got {tensor.dtype}")
