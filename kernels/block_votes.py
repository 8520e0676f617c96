# SPDX-License-Identifier: Apache-2.0
"""Votes of a prefill's blocks over their candidates (TokenSelect, arXiv 2411.02886, sections 3.2 and 3.4).

Two passes over the keys, so that no logit is kept: the first makes the log-sum-exp of each row and head, the second
computes the logits again and adds up the votes of all heads in registers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .block_plan import BlockPlan, BlockScratch
from .checks import expect
from .paged_keys import PagedKeys
from .reference.prefill import Combine
from .workspace import TILE


@triton.jit
def _find_tile(runs_ptr, row_tiles_ptr, num_runs, unit):
    """Row tile of a unit of work, and the unit's index along the tile's keys."""
    run = unit * 0
    after = run + num_runs
    while after - run > 1:
        middle = (run + after) // 2
        is_behind = tl.load(runs_ptr + middle * 2 + 1) <= unit
        run = tl.where(is_behind, middle, run)
        after = tl.where(is_behind, after, middle)
    first_tile = tl.load(runs_ptr + run * 2)
    num_tiles = tl.load(runs_ptr + run * 2 + 2) - first_tile
    local_unit = unit - tl.load(runs_ptr + run * 2 + 1)
    return row_tiles_ptr + (first_tile + local_unit % num_tiles) * 6, local_unit // num_tiles


@triton.jit
def _load_keys(
    key_ptr,
    slots_ptr,
    begin,
    end,
    stride_key_slot,
    dtype,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Keys of candidates [begin, begin + BLOCK_N), zeros from ``end`` on if MASKED; [BLOCK_N, HEAD_DIM]."""
    offs_n = begin + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, HEAD_DIM)
    if MASKED:
        mask = offs_n < end
        slots = tl.load(slots_ptr + offs_n, mask=mask, other=0).to(tl.int64)
        keys = tl.load(key_ptr + slots[:, None] * stride_key_slot + offs_d[None, :], mask=mask[:, None], other=0.0)
    else:
        slots = tl.load(slots_ptr + offs_n).to(tl.int64)
        keys = tl.load(key_ptr + slots[:, None] * stride_key_slot + offs_d[None, :])
    return keys.to(dtype)


@triton.jit
def _fold_keys(
    top,
    total,
    means,
    ends,
    key_ptr,
    slots_ptr,
    begin,
    end,
    scale,
    stride_key_slot,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Folds candidates [begin, end) into each row's running maximum and sum, base 2."""
    for n in range(begin, end, BLOCK_N):
        keys = _load_keys(key_ptr, slots_ptr, n, end, stride_key_slot, means.dtype, HEAD_DIM, BLOCK_N, MASKED)
        # [BLOCK_M, BLOCK_N]
        dots = tl.dot(means, tl.trans(keys))
        if MASKED:
            dots = tl.where(n + tl.arange(0, BLOCK_N)[None, :] < ends[:, None], dots, float("-inf"))
        new_top = tl.maximum(top, tl.max(dots, axis=1) * scale)
        shift = new_top
        if MASKED:
            shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # -inf - -inf is NaN
        total = total * tl.exp2(top - shift) + tl.sum(tl.exp2(dots * scale - shift[:, None]), axis=1)
        top = new_top
    return top, total


@triton.jit(do_not_specialize=["num_runs", "num_units"])
def _logsumexp_kernel(
    means_ptr,
    key_ptr,
    req_to_token_ptr,
    req_pool_indices_ptr,
    num_candidates_ptr,
    num_rows_ptr,
    row_tiles_ptr,
    runs_ptr,
    max_ptr,
    sum_ptr,
    num_runs,
    num_units,
    num_sink,
    split_tokens,
    scale,
    stride_means_row,
    stride_means_head,
    stride_key_slot,
    stride_key_head,
    stride_table_row,
    stride_partial_split,
    stride_partial_head,
    GROUP: tl.constexpr,
    ROWS_PER_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # Heads of a group are neighbours and KV heads the slowest: programs that run together read the same keys.
    pid = tl.program_id(0)
    unit = (pid // GROUP) % num_units
    kv_head = (pid // GROUP // num_units).to(tl.int64)
    head = kv_head * GROUP + pid % GROUP
    tile_ptr, split = _find_tile(runs_ptr, row_tiles_ptr, num_runs, unit)
    first_block = tl.load(tile_ptr)
    num_blocks = tl.load(tile_ptr + 1)
    begin = tl.load(tile_ptr + 2) * TILE + split * split_tokens
    fewest = tl.load(tile_ptr + 3)
    most = tl.load(tile_ptr + 4)

    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, HEAD_DIM)
    block = offs_m // ROWS_PER_BLOCK
    mask_m = block < num_blocks
    ends = tl.load(num_candidates_ptr + first_block + block, mask=mask_m, other=0)
    mask_m = offs_m % ROWS_PER_BLOCK < tl.load(num_rows_ptr + first_block + block, mask=mask_m, other=0)
    first_row = first_block.to(tl.int64) * ROWS_PER_BLOCK
    means_ptr += first_row * stride_means_row + head * stride_means_head
    # [BLOCK_M, HEAD_DIM]
    means = tl.load(means_ptr + offs_m[:, None] * stride_means_row + offs_d[None, :], mask=mask_m[:, None], other=0.0)

    req = tl.load(req_pool_indices_ptr + first_block).to(tl.int64)
    slots_ptr = req_to_token_ptr + req * stride_table_row + num_sink
    key_ptr += kv_head * stride_key_head
    end = tl.minimum(begin + split_tokens, most)
    whole = begin + tl.maximum(tl.minimum(end, fewest) - begin, 0) // BLOCK_N * BLOCK_N
    top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    top, total = _fold_keys(
        top,
        total,
        means,
        ends,
        key_ptr,
        slots_ptr,
        begin,
        whole,
        scale,
        stride_key_slot,
        HEAD_DIM,
        BLOCK_N,
        MASKED=False,
    )
    top, total = _fold_keys(
        top, total, means, ends, key_ptr, slots_ptr, whole, end, scale, stride_key_slot, HEAD_DIM, BLOCK_N, MASKED=True
    )

    split += tl.load(tile_ptr + 5)
    offset = split.to(tl.int64) * stride_partial_split + head * stride_partial_head + first_row
    mask_m = block < num_blocks
    tl.store(max_ptr + offset + offs_m, top, mask=mask_m)
    tl.store(sum_ptr + offset + offs_m, total, mask=mask_m)


@triton.jit(do_not_specialize=["num_blocks"])
def _reduce_kernel(
    num_splits_ptr,
    max_ptr,
    sum_ptr,
    lse_ptr,
    num_blocks,
    stride_partial_split,
    stride_partial_head,
    stride_lse_head,
    ROWS_PER_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    first_block = tl.program_id(0) * (BLOCK_M // ROWS_PER_BLOCK)
    offs_m = tl.arange(0, BLOCK_M)
    block = first_block + offs_m // ROWS_PER_BLOCK
    mask_m = block < num_blocks
    # Nothing is written beyond a block's own splits.
    num_splits = tl.load(num_splits_ptr + block, mask=mask_m, other=0)
    first_row = first_block.to(tl.int64) * ROWS_PER_BLOCK
    offset = head * stride_partial_head + first_row
    # [BLOCK_M]
    top = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    for split in range(tl.max(num_splits)):
        mask_split = split < num_splits
        split_top = tl.load(max_ptr + offset + offs_m, mask=mask_split, other=float("-inf"))
        split_total = tl.load(sum_ptr + offset + offs_m, mask=mask_split, other=0.0)
        new_top = tl.maximum(top, split_top)
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp2(top - shift) + split_total * tl.exp2(split_top - shift)
        top = new_top
        offset += stride_partial_split
    # A row without candidates gets infinity, so that its probabilities are 0.
    lse = tl.where(top > float("-inf"), top + tl.log2(total), float("inf"))
    tl.store(lse_ptr + head * stride_lse_head + first_row + offs_m, lse, mask=mask_m)


@triton.jit(do_not_specialize=["num_runs"])
def _votes_kernel(
    means_ptr,
    key_ptr,
    req_to_token_ptr,
    req_pool_indices_ptr,
    num_candidates_ptr,
    num_rows_ptr,
    tile_indptr_ptr,
    row_tiles_ptr,
    runs_ptr,
    lse_ptr,
    scores_ptr,
    row_votes_ptr,
    num_runs,
    num_sink,
    scale,
    stride_means_row,
    stride_means_head,
    stride_key_slot,
    stride_key_head,
    stride_table_row,
    stride_lse_head,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS_PER_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr,
    COMBINE_MAX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    tile_ptr, key_tile = _find_tile(runs_ptr, row_tiles_ptr, num_runs, tl.program_id(0))
    first_block = tl.load(tile_ptr)
    num_blocks = tl.load(tile_ptr + 1)
    begin = tl.load(tile_ptr + 2) * TILE + key_tile * BLOCK_N
    most = tl.load(tile_ptr + 4)
    if begin >= most:  # another row tile of the run has more candidates
        return

    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, HEAD_DIM)
    block = offs_m // ROWS_PER_BLOCK
    mask_m = block < num_blocks
    mask_m = offs_m % ROWS_PER_BLOCK < tl.load(num_rows_ptr + first_block + block, mask=mask_m, other=0)
    first_row = first_block.to(tl.int64) * ROWS_PER_BLOCK
    means_ptr += first_row * stride_means_row
    lse_ptr += first_row
    # Offsets of 32 bits beside a scalar pointer: a tile of pointers would not fit the registers.
    offs_means = offs_m[:, None] * stride_means_row + offs_d[None, :]

    req = tl.load(req_pool_indices_ptr + first_block).to(tl.int64)
    slots_ptr = req_to_token_ptr + req * stride_table_row + num_sink
    # [BLOCK_M, BLOCK_N]
    votes = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for _ in range(NUM_KV_HEADS):
        keys = _load_keys(
            key_ptr,
            slots_ptr,
            begin,
            most,
            stride_key_slot,
            means_ptr.dtype.element_ty,
            HEAD_DIM,
            BLOCK_N,
            MASKED=True,
        )
        keys = tl.trans(keys)
        for _ in range(GROUP):
            # Rows that do not vote: dots of 0 less infinity.
            means = tl.load(means_ptr + offs_means, mask=mask_m[:, None], other=0.0)
            lse = tl.load(lse_ptr + offs_m, mask=mask_m, other=float("inf"))
            votes += tl.exp2(tl.dot(means, keys) * scale - lse[:, None])
            means_ptr += stride_means_head
            lse_ptr += stride_lse_head
        key_ptr += stride_key_head

    BLOCKS: tl.constexpr = BLOCK_M // ROWS_PER_BLOCK
    # [BLOCKS, BLOCK_N]
    offs_n = begin + tl.arange(0, BLOCK_N)
    if row_votes_ptr is not None:
        ends = tl.load(num_candidates_ptr + first_block + block, mask=block < num_blocks, other=0)
        base = tl.load(tile_indptr_ptr + first_block + block, mask=block < num_blocks, other=0).to(tl.int64)
        rows = (base[:, None] + (offs_n // TILE)[None, :]) * ROWS_PER_BLOCK + (offs_m % ROWS_PER_BLOCK)[:, None]
        offs_votes = rows * TILE + (offs_n % TILE)[None, :]
        tl.store(row_votes_ptr + offs_votes, votes, mask=offs_n[None, :] < ends[:, None])
    else:
        by_block = tl.reshape(votes, [BLOCKS, ROWS_PER_BLOCK, BLOCK_N])
        score = tl.max(by_block, axis=1) if COMBINE_MAX else tl.sum(by_block, axis=1)
        offs_block = tl.arange(0, BLOCKS)
        mask_block = offs_block < num_blocks
        ends = tl.load(num_candidates_ptr + first_block + offs_block, mask=mask_block, other=0)
        base = tl.load(tile_indptr_ptr + first_block + offs_block, mask=mask_block, other=0).to(tl.int64) * TILE
        tl.store(scores_ptr + base[:, None] + offs_n[None, :], score, mask=offs_n[None, :] < ends[:, None])


@triton.jit
def _combine_rows_kernel(row_votes_ptr, scores_ptr, ROWS_PER_BLOCK: tl.constexpr, TILE: tl.constexpr):
    tile = tl.program_id(0).to(tl.int64)
    rows = tile * ROWS_PER_BLOCK + tl.arange(0, ROWS_PER_BLOCK)[:, None]
    lanes = tl.arange(0, TILE)
    votes = tl.load(row_votes_ptr + rows * TILE + lanes[None, :])
    tl.store(scores_ptr + tile * TILE + lanes, tl.max(votes, axis=0))


@dataclass(frozen=True)
class BlockRanks:
    """With tensor parallelism: how the votes of all ranks' heads are added up in prefill.

    A block's sub-blocks combine by the maximum of what *all* heads say, so each sub-block's votes are added up apart.

    Attributes:
        sum_: adds up a tensor over the ranks, in place, on the current stream.
        row_votes: float32, rows_per_block times the scores of the largest plan; none needed for one row a block.
    """

    sum_: Callable[[torch.Tensor], object]
    row_votes: torch.Tensor

    def rows_of(self, plan: BlockPlan) -> torch.Tensor:
        """[plan.num_tiles, rows_per_block, TILE].

        Raises:
            ValueError: there are not so many.
        """
        count = plan.num_tiles * plan.rows_per_block * TILE
        if self.row_votes.numel() < count:
            raise ValueError(f"row_votes: expected {count} numbers or more, got {self.row_votes.numel()}")
        return self.row_votes[:count].view(plan.num_tiles, plan.rows_per_block, TILE)


def score_blocks(
    means: torch.Tensor,
    keys: PagedKeys,
    plan: BlockPlan,
    scratch: BlockScratch,
    scores: torch.Tensor,
    *,
    num_sink: int,
    vote_scale: float,
    combine: Combine,
    ranks: BlockRanks | None = None,
) -> None:
    """Writes each block's score of each of its candidates, positions [num_sink, num_sink + num_candidates).

    A row and query head h spread one vote by ``softmax(vote_scale * means[row, h] . K[j, h // group])`` over the
    block's candidates j; the votes of the heads add up, and the rows of a block combine by ``combine``. Logits,
    exponents and sums are float32. The other blocks of the call change a score by rounding at most, since they
    decide how a log-sum-exp is split.

    Args:
        means: [num_blocks * rows_per_block, num_qo_heads, head_dim] of :func:`mean_queries`, dtype of the keys
            (bfloat16 or float16 with float8 keys, whose conversion to float16 is the cheaper one). Rows beyond a
            block's ``num_rows`` are not read.
        plan: of this forward's blocks, on the device.
        scratch: for at least the plan's rows and exactly its heads.
        scores: [at least plan.num_tiles, TILE] float32, see :attr:`BlockPlan.tile_indptr`; nothing is written
            outside of the blocks' candidates.
        vote_scale: above 0; logits are *not* divided by sqrt(head_dim).
        ranks: the heads are those of one rank, and the scores are to be those of all; None: these are all. Then the
            tiles' numbers behind a block's candidates are overwritten too.

    Raises:
        ValueError: a dtype, shape or size is not as stated.
    """
    _check(means, keys, plan, scratch, scores)
    if not vote_scale > 0:
        raise ValueError(f"vote_scale: expected more than 0, got {vote_scale}")
    if combine not in ("max", "sum"):
        raise ValueError(f"combine: expected 'max' or 'sum', got {combine!r}")
    if not plan.num_tiles:
        return
    scale = keys.logit_scale(vote_scale)
    _make_logsumexp(means, keys, plan, scratch, num_sink, scale)
    row_votes = ranks.rows_of(plan) if ranks and combine == "max" and plan.rows_per_block > 1 else None
    _add_votes(means, keys, plan, scratch, scores, row_votes, num_sink, scale, combine)
    if ranks is not None and row_votes is not None:
        ranks.sum_(row_votes)
        _combine_rows_kernel[(plan.num_tiles,)](row_votes, scores, ROWS_PER_BLOCK=plan.rows_per_block, TILE=TILE)
    elif ranks is not None:
        ranks.sum_(scores[: plan.num_tiles])


def _check(means: torch.Tensor, keys: PagedKeys, plan: BlockPlan, scratch: BlockScratch, scores: torch.Tensor) -> None:
    num_rows = plan.num_blocks * plan.rows_per_block
    expect("means", means, (num_rows, plan.num_qo_heads, keys.head_dim), *keys.query_dtypes)
    if plan.num_qo_heads % keys.num_kv_heads:
        raise ValueError(f"num_qo_heads: expected a multiple of {keys.num_kv_heads}, got {plan.num_qo_heads}")
    expect("scores", scores, (None, TILE), torch.float32)
    if scores.shape[0] < plan.num_tiles or not scores.is_contiguous():
        raise ValueError(
            f"scores: expected {plan.num_tiles} contiguous tiles or more, "
            f"got {scores.shape[0]} with strides {scores.stride()}"
        )
    expect("scratch.lse", scratch.lse, (plan.num_qo_heads, None), torch.float32)
    if scratch.lse.shape[1] < num_rows:
        raise ValueError(f"scratch: expected {num_rows} rows or more, got {scratch.lse.shape[1]}")


def _make_logsumexp(
    means: torch.Tensor, keys: PagedKeys, plan: BlockPlan, scratch: BlockScratch, num_sink: int, scale: float
) -> None:
    """First pass: the base-2 log-sum-exp of each row and head, in ``scratch.lse``."""
    num_qo_heads = plan.num_qo_heads
    partial_max, partial_sum = scratch.partial
    tiling, tuning = plan.logsumexp, plan.logsumexp.tuning
    _logsumexp_kernel[(tiling.num_units * num_qo_heads,)](
        means,
        keys.pool,
        keys.req_to_token,
        plan.req_pool_indices,
        plan.num_candidates,
        plan.num_rows,
        tiling.row_tiles,
        tiling.runs,
        partial_max,
        partial_sum,
        tiling.runs.shape[0] - 1,
        tiling.num_units,
        num_sink,
        plan.split_tokens,
        scale,
        means.stride(0),
        means.stride(1),
        keys.pool.stride(0),
        keys.pool.stride(1),
        keys.req_to_token.stride(0),
        partial_max.stride(0),
        partial_max.stride(1),
        GROUP=num_qo_heads // keys.num_kv_heads,
        ROWS_PER_BLOCK=plan.rows_per_block,
        HEAD_DIM=keys.head_dim,
        TILE=TILE,
        BLOCK_M=tuning.block_m,
        BLOCK_N=tuning.block_n,
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
        maxnreg=tuning.max_registers,
    )
    _reduce_kernel[(triton.cdiv(plan.num_blocks * plan.rows_per_block, tuning.block_m), num_qo_heads)](
        plan.num_splits,
        partial_max,
        partial_sum,
        scratch.lse,
        plan.num_blocks,
        partial_max.stride(0),
        partial_max.stride(1),
        scratch.lse.stride(0),
        ROWS_PER_BLOCK=plan.rows_per_block,
        BLOCK_M=tuning.block_m,
        num_warps=4,
    )


def _add_votes(
    means: torch.Tensor,
    keys: PagedKeys,
    plan: BlockPlan,
    scratch: BlockScratch,
    scores: torch.Tensor,
    row_votes: torch.Tensor | None,
    num_sink: int,
    scale: float,
    combine: Combine,
) -> None:
    """Second pass: the votes that ``scratch.lse`` makes of the logits, summed over heads. Combined over rows, unless
    ``row_votes`` takes each row's."""
    tiling, tuning = plan.votes, plan.votes.tuning
    _votes_kernel[(tiling.num_units,)](
        means,
        keys.pool,
        keys.req_to_token,
        plan.req_pool_indices,
        plan.num_candidates,
        plan.num_rows,
        plan.tile_indptr,
        tiling.row_tiles,
        tiling.runs,
        scratch.lse,
        scores,
        row_votes,
        tiling.runs.shape[0] - 1,
        num_sink,
        scale,
        means.stride(0),
        means.stride(1),
        keys.pool.stride(0),
        keys.pool.stride(1),
        keys.req_to_token.stride(0),
        scratch.lse.stride(0),
        NUM_KV_HEADS=keys.num_kv_heads,
        GROUP=plan.num_qo_heads // keys.num_kv_heads,
        ROWS_PER_BLOCK=plan.rows_per_block,
        HEAD_DIM=keys.head_dim,
        TILE=TILE,
        COMBINE_MAX=combine == "max",
        BLOCK_M=tuning.block_m,
        BLOCK_N=tuning.block_n,
        num_warps=tuning.num_warps,
        num_stages=tuning.num_stages,
        maxnreg=tuning.max_registers,
    )
