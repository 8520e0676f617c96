# SPDX-License-Identifier: Apache-2.0
"""Selection for the blocks of a prefill: one plan per forward, and the launches of one layer, in order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from .block_means import mean_queries
from .block_plan import (
    BlockPlan,
    BlockScratch,
    count_rows_per_block,
    plan_blocks,
    request_runs,
)
from .block_sharing import order_blocks
from .block_votes import BlockRanks, score_blocks
from .checks import expect
from .emit import emit
from .paged_keys import PagedKeys
from .reference.prefill import Combine
from .rows import EVERYTHING, SelectionRows
from .shared_segment import SharedSegment
from .transfer import int32, to_device
from .vote import take_scores
from .workspace import Workspace, WorkspaceLimits, count_multiprocessors, count_tiles


@dataclass(frozen=True)
class PrefillBlock:
    """Queries of an extend that share one selection (spec, "Selection in prefill"), or that need none.

    A block attends to the sink, to ``budget`` tokens that it chooses, to the ``num_local`` tokens before it and to
    itself. A *dense* one, of budget -1, attends to everything before it and to itself, and the caller writes its
    slots: those of positions [0, end).

    Attributes:
        req_pool_idx: row of ``req_to_token``.
        start, end: positions [start, end) of its queries, within one multiple of the block size; any positions if
            dense.
        first_query: index of its first query among the queries of the forward.
        budget: tokens to choose, less than its candidates; -1: dense.
        own_local: how many of its own tokens count as the last ones of the local window, which ends as many later: 1
            makes a block of one query the decode step of that query.
    """

    req_pool_idx: int
    start: int
    end: int
    first_query: int
    budget: int
    own_local: int = 0

    @property
    def is_dense(self) -> bool:
        return self.budget == EVERYTHING

    @property
    def past(self) -> int:
        """Tokens that sink, candidates and local window are made of."""
        return self.start + self.own_local

    def num_slots(self, num_sink: int, num_local: int) -> int:
        """Tokens that it attends to."""
        if self.is_dense:
            return self.end
        return num_sink + self.budget + num_local + self.end - self.past


@dataclass(frozen=True)
class PrefillPart:
    """Blocks that are selected at once, none of them dense. All tensors are int32 on the device.

    Attributes:
        first_query, num_queries, start: [num_blocks], for :func:`mean_queries`.
        scoring: for :func:`score_blocks`.
        rows: for :func:`take_scores` and :func:`emit`, one for each block.
        kv_start: [num_blocks], where each block's slots begin, of the plan's ``kv_indptr``.
    """

    first_query: torch.Tensor
    num_queries: torch.Tensor
    start: torch.Tensor
    scoring: BlockPlan
    rows: SelectionRows
    kv_start: torch.Tensor


@dataclass(frozen=True)
class PrefillPlan:
    """What :func:`select_blocks` does in each layer of one forward; made by :func:`plan_prefill`.

    Attributes:
        parts: what a workspace of ``limits`` holds at once; blocks in the order in which they share keys.
        kv_indptr: [num_items + 1] int32 on the device, over all blocks, dense ones too: where each one's slots go.
        kv_indptr_cpu: the same on the host, where FlashInfer plans the attention.
        qo_indptr_cpu: [num_items + 1] int32 on the host, where each block's queries begin.
        num_slots: ``kv_indptr[-1]``, on the host.
        num_means: rows of means of the largest part.
        sub_block, num_sink: tokens.
    """

    parts: tuple[PrefillPart, ...]
    kv_indptr: torch.Tensor
    kv_indptr_cpu: torch.Tensor
    qo_indptr_cpu: torch.Tensor
    limits: WorkspaceLimits
    num_slots: int
    num_means: int
    sub_block: int
    num_sink: int


def plan_prefill(
    blocks: Sequence[PrefillBlock],
    limits: WorkspaceLimits,
    *,
    block: int,
    sub_block: int,
    num_sink: int,
    num_local: int,
    num_qo_heads: int,
    device: torch.device | str,
    shared: Sequence[SharedSegment] = (),
) -> PrefillPlan:
    """Plans the selection of all blocks of an extend, with one copy to the device.

    A block gets ``num_sink + budget + num_local + (end - start)`` slots, a dense one ``end``. Blocks of one request
    should follow each other: they then share the reading of its keys, unless the workspace does not hold them all
    at once. So do blocks of several requests in ``shared`` positions.

    Args:
        blocks: in the order of their queries: ``qo_indptr_cpu`` takes each to begin where the one before it ends.
        limits: of the workspace that the plan is for.
        block, sub_block: sizes in tokens; both cut at their absolute multiples.
        num_qo_heads: heads that vote.
        shared: segments whose ``rows`` are rows of ``req_to_token``; requests without blocks may be among them.

    Raises:
        ValueError: a size or a block that is not as stated, or that does not fit ``limits``.
    """
    rows_per_block = count_rows_per_block(block, sub_block)
    for index, item in enumerate(blocks):
        _check_block(f"blocks[{index}]", item, limits, block, num_sink, num_local)

    kv_indptr = [0, *accumulate(item.num_slots(num_sink, num_local) for item in blocks)]
    qo_indptr = [0, *accumulate(item.end - item.start for item in blocks)]
    voting = [(item, start) for item, start in zip(blocks, kv_indptr, strict=False) if not item.is_dense]
    # Who chooses nothing scores nothing.
    num_candidates = [item.past - num_local - num_sink if item.budget else 0 for item, _ in voting]
    req_pool_indices = [item.req_pool_idx for item, _ in voting]
    order, num_common = order_blocks(req_pool_indices, num_candidates, shared, num_sink=num_sink)
    voting, num_candidates = [voting[b] for b in order], [num_candidates[b] for b in order]
    req_pool_indices = [req_pool_indices[b] for b in order]
    num_multiprocessors = count_multiprocessors(device)
    parts = []
    for span in _cut_parts(req_pool_indices, num_candidates, limits):
        items, kv_start = zip(*voting[span.start : span.stop], strict=True)
        scoring = plan_blocks(
            req_pool_indices[span.start : span.stop],
            num_candidates[span.start : span.stop],
            [-(-item.end // sub_block) - item.start // sub_block for item in items],
            rows_per_block=rows_per_block,
            num_qo_heads=num_qo_heads,
            num_multiprocessors=num_multiprocessors,
            num_common=num_common[span.start : span.stop - 1],
        )
        parts.append(_make_part(items, scoring, kv_start, num_local))
    kv_indptr_cpu = int32(kv_indptr)
    device_parts, kv_indptr_device = to_device((tuple(parts), kv_indptr_cpu), device)
    return PrefillPlan(
        parts=device_parts,
        kv_indptr=kv_indptr_device,
        kv_indptr_cpu=kv_indptr_cpu,
        qo_indptr_cpu=int32(qo_indptr),
        limits=limits,
        num_slots=kv_indptr[-1],
        num_means=max((part.scoring.num_blocks for part in parts), default=0) * rows_per_block,
        sub_block=sub_block,
        num_sink=num_sink,
    )


def _check_block(
    name: str, item: PrefillBlock, limits: WorkspaceLimits, block: int, num_sink: int, num_local: int
) -> None:
    if not -1 <= item.budget <= limits.max_budget:
        raise ValueError(f"{name}.budget: expected -1 to {limits.max_budget}, got {item.budget}")
    if item.is_dense:
        if not 0 <= item.start < item.end:
            raise ValueError(f"{name}: expected 0 <= start < end, got {item.start} and {item.end}")
        return
    window = num_sink + item.budget + num_local
    if not 0 <= item.own_local <= min(item.end - item.start, num_local):
        raise ValueError(f"{name}.own_local: expected 0 to its tokens or {num_local}, num_local, got {item.own_local}")
    if item.past <= window:
        raise ValueError(f"{name}.start: expected more than {window - item.own_local}, the window, got {item.start}")
    most = min((item.start // block + 1) * block, limits.max_seq_len)
    if not item.start < item.end <= most:
        raise ValueError(f"{name}.end: expected {item.start + 1} to {most}, got {item.end}")


def _cut_parts(
    req_pool_indices: Sequence[int], num_candidates: Sequence[int], limits: WorkspaceLimits
) -> Iterator[range]:
    """Spans of blocks that the workspace holds at once. A request that none holds whole is cut evenly.

    Its pieces read all of its keys each, so a small one would cost almost as much as a large one.
    """
    tile_indptr = count_tiles(num_candidates)

    def fits(first: int, stop: int) -> bool:
        return stop - first <= limits.max_rows and tile_indptr[stop] - tile_indptr[first] <= limits.num_tiles

    first = 0
    for run in request_runs(req_pool_indices):
        if first < run.start and not fits(first, run.stop):
            yield range(first, run.start)
            first = run.start
        if not fits(first, run.stop):
            *pieces, last = _cut_evenly(run, fits)
            yield from pieces
            first = last.start
    if req_pool_indices:
        yield range(first, len(req_pool_indices))


def _cut_evenly(run: range, fits: Callable[[int, int], bool]) -> list[range]:
    """The run in as few pieces of one size as fit; the last may be smaller. One block always fits."""
    for count in range(2, len(run) + 1):
        size = -(-len(run) // count)
        pieces = [run[i : i + size] for i in range(0, len(run), size)]
        if all(fits(piece.start, piece.stop) for piece in pieces):
            break
    return pieces


def _make_part(
    blocks: Sequence[PrefillBlock], scoring: BlockPlan, kv_start: Sequence[int], num_local: int
) -> PrefillPart:
    """The part on the host."""
    return PrefillPart(
        first_query=int32([block.first_query for block in blocks]),
        num_queries=int32([block.end - block.start for block in blocks]),
        start=int32([block.start for block in blocks]),
        scoring=scoring,
        rows=SelectionRows(
            num_candidates=scoring.num_candidates,
            num_chosen=int32([block.budget for block in blocks]),
            tail_start=int32([block.past - num_local for block in blocks]),
            kv_end=int32([block.end for block in blocks]),
            cached=int32([0] * len(blocks)),
        ),
        kv_start=int32(kv_start),
    )


def select_blocks(
    query: torch.Tensor,
    keys: PagedKeys,
    plan: PrefillPlan,
    workspace: Workspace,
    scratch: BlockScratch,
    means: torch.Tensor,
    kv_indices: torch.Tensor,
    *,
    vote_scale: float,
    combine: Combine,
    ranks: BlockRanks | None = None,
) -> None:
    """Writes the slots that each block of a prefill attends to in one layer. No host sync and no allocation.

    Args:
        query: [num_tokens, num_qo_heads, head_dim] bfloat16 or float16, last dimension contiguous; rotated as it is
            to be scored.
        plan: see :func:`plan_prefill`.
        workspace: for the plan's limits.
        scratch: for the rows of ``means``.
        means: [at least blocks of a part * rows per block, num_qo_heads, head_dim], dtype of the keys (bfloat16 or
            float16 with float8 keys); overwritten. ``limits.max_rows`` times :func:`count_rows_per_block` rows are
            always enough.
        kv_indices: [>= kv_indptr[-1]] int32, written: sink, chosen, local and own slots, ascending in position. The
            slots of dense blocks are not touched.
        vote_scale: factor of the logits, which are *not* divided by sqrt(head_dim).
        combine: how the votes of a block's sub-blocks become one score.
        ranks: the heads are those of one rank, and all ranks choose together; None: they choose for themselves.

    Raises:
        ValueError: shapes or dtypes that do not fit each other, or a workspace that does not hold the plan's limits.
    """
    _check(plan, workspace, means, kv_indices)
    for part in plan.parts:
        scoring, num_blocks = part.scoring, part.scoring.num_blocks
        part_means = means[: num_blocks * scoring.rows_per_block]
        mean_queries(
            query,
            part.first_query,
            part.num_queries,
            part.start,
            sub_block=plan.sub_block,
            rows_per_block=scoring.rows_per_block,
            out=part_means,
        )
        score_blocks(
            part_means,
            keys,
            scoring,
            scratch,
            workspace.scores,
            num_sink=plan.num_sink,
            vote_scale=vote_scale,
            combine=combine,
            ranks=ranks,
        )
        take_scores(part.rows, num_blocks, workspace)
        emit(
            keys.req_to_token,
            scoring.req_pool_indices,
            part.rows,
            num_blocks,
            workspace,
            part.kv_start,
            kv_indices,
            num_sink=plan.num_sink,
        )


def _check(plan: PrefillPlan, workspace: Workspace, means: torch.Tensor, kv_indices: torch.Tensor) -> None:
    if not workspace.limits.include(plan.limits):
        raise ValueError(
            f"workspace.limits: expected those of the plan, {plan.limits}, or more, got {workspace.limits}"
        )
    expect("kv_indices", kv_indices, (None,), torch.int32)
    if kv_indices.shape[0] < plan.num_slots:
        raise ValueError(f"kv_indices: expected {plan.num_slots} slots or more, got {kv_indices.shape[0]}")
    if means.shape[0] < plan.num_means:
        raise ValueError(f"means: expected {plan.num_means} rows or more, got {means.shape[0]}")
