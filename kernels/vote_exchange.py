# SPDX-License-Identifier: Apache-2.0
"""Tensor parallel: how the ranks agree on whom a decode step attends to, in kernels alone (spec, "Selection").

Each rank holds some of the heads. Two things are sums over all heads: the cosine that decides about reuse, and the
votes. Ranks write into each other's memory and wait for each other on the device, so a CUDA graph of a step holds
whatever its lengths are; NCCL would have to be told how many scores there are. All ranks add up in the order of ranks,
and so come to the same numbers, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .launch import start_next, wait_for_previous
from .rows import SelectionRows, first_tile_of, rows_block
from .vote_keys import vote_keys
from .workspace import TILE, Workspace, WorkspaceLimits

MESSAGE = 4
"""Words of a row's message about reuse: three numbers, rounded up."""

ALIGNED_WORDS = 32
"""Regions of the memory begin at multiples of 256 bytes."""


@dataclass(frozen=True)
class ExchangeLayout:
    """Where things lie in the memory of each rank, in words of 8 bytes.

    - ``world_size`` flags: how often each rank has said that its votes are there;
    - messages about reuse, [2, world_size, max_rows, MESSAGE]: each word holds a count and a float32, so that it tells
      by itself that it has come; messages take turns between two places;
    - scores of each rank's heads, float32, [2, world_size, num_tiles, TILE], which take turns too.

    All ranks write here, and only this one reads: what is written over NVLink is waited for once, by the flag behind
    it, what is read at every load. A place is written again after two turns only; its writer has then heard that this
    rank is through with it.
    """

    world_size: int
    max_rows: int
    num_tiles: int

    @classmethod
    def of(cls, world_size: int, limits: WorkspaceLimits) -> ExchangeLayout:
        return cls(world_size, limits.max_rows, limits.num_tiles)

    @property
    def first_message(self) -> int:
        return _aligned(self.world_size)

    @property
    def first_place(self) -> int:
        """Of scores, in numbers of 4 bytes."""
        return 2 * (self.first_message + _aligned(2 * self.world_size * self.max_rows * MESSAGE))

    @property
    def place_size(self) -> int:
        """Scores of one rank in one turn."""
        return self.num_tiles * TILE

    @property
    def num_words(self) -> int:
        return self.first_place // 2 + self.world_size * self.place_size


class VoteExchange:
    """One rank's side. Ranks must make the same calls in the same order, with the same rows."""

    def __init__(self, rank: int, layout: ExchangeLayout, addresses: Sequence[int], memory: torch.Tensor) -> None:
        """
        Args:
            addresses: of each rank's memory, as this process reaches it.
            memory: [layout.num_words] int64, zeros, this rank's own. All ranks' must be zeros before the first call.

        Raises:
            ValueError: sizes that do not fit each other.
        """
        if len(addresses) != layout.world_size or not 0 <= rank < layout.world_size:
            raise ValueError(f"addresses: expected {layout.world_size}, rank {rank} among them, got {len(addresses)}")
        if tuple(memory.shape) != (layout.num_words,) or memory.dtype != torch.int64:
            raise ValueError(f"memory: expected {layout.num_words} int64, got {tuple(memory.shape)} {memory.dtype}")
        device = memory.device
        self.rank, self.layout, self.memory = rank, layout, memory
        self.handle: object = None  # of whoever mapped the addresses, if they last only as long as it does
        self.addresses = torch.tensor(addresses, dtype=torch.int64, device=device)
        # Messages that each row has sent, and sums of votes that were made.
        self.sent = torch.zeros(layout.max_rows, dtype=torch.int32, device=device)
        self.summed = torch.zeros(1, dtype=torch.int32, device=device)
        # As in a workspace: programs that are done; 0 between calls.
        self.arrivals = torch.zeros(1, dtype=torch.int32, device=device)


def _aligned(words: int) -> int:
    return -(-words // ALIGNED_WORDS) * ALIGNED_WORDS


@triton.jit
def _send(memories_ptr, offset, count, value, WORLD: tl.constexpr):
    """To every rank at once; a store of 8 bytes arrives as a whole."""
    bits = value.to(tl.int32, bitcast=True).to(tl.int64) & 0xFFFFFFFF
    word = (count.to(tl.int64) << 32) | bits
    for rank in tl.static_range(WORLD):
        memory = tl.load(memories_ptr + rank).to(tl.pointer_type(tl.int64))
        tl.store(memory + offset, word)


@triton.jit
def _receive(inbox_ptr, stride_rank, count, WORLD: tl.constexpr):
    """Waits for every rank's word and returns the sum of what they say."""
    total = 0.0
    for rank in tl.static_range(WORLD):
        word = tl.load(inbox_ptr + rank * stride_rank, volatile=True)
        while (word >> 32).to(tl.int32) != count:
            word = tl.load(inbox_ptr + rank * stride_rank, volatile=True)
        total += (word & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)
    return total


@triton.jit
def sum_over_ranks(
    first,
    second,
    third,
    row,
    memories_ptr,
    sent_ptr,
    rank,
    first_message,
    max_rows,
    WORLD: tl.constexpr,
    MESSAGE: tl.constexpr,
):
    """Sums of three numbers over all ranks, for one row, in the same call of a kernel on every rank.

    Only this row's program touches ``sent_ptr + row``.
    """
    count = tl.load(sent_ptr + row) + 1
    turn = (count & 1) * WORLD
    offset = first_message + ((turn + rank) * max_rows + row) * MESSAGE
    _send(memories_ptr, offset, count, first, WORLD)
    _send(memories_ptr, offset + 1, count, second, WORLD)
    _send(memories_ptr, offset + 2, count, third, WORLD)
    own = tl.load(memories_ptr + rank).to(tl.pointer_type(tl.int64))
    inbox_ptr = own + first_message + (turn * max_rows + row) * MESSAGE
    first = _receive(inbox_ptr, max_rows * MESSAGE, count, WORLD)
    second = _receive(inbox_ptr + 1, max_rows * MESSAGE, count, WORLD)
    third = _receive(inbox_ptr + 2, max_rows * MESSAGE, count, WORLD)
    tl.store(sent_ptr + row, count)
    return first, second, third


@triton.jit
def place_of_scores(count, rank, first_place, stride_place, WORLD: tl.constexpr):
    """Where one rank's scores of sum number ``count`` begin, in every rank's memory."""
    return first_place + ((count & 1) * WORLD + rank).to(tl.int64) * stride_place


@triton.jit
def store_scores(scores_ptr, memories_ptr, offsets, scores, mask, WORLD: tl.constexpr):
    """To ``scores_ptr``, or with other ranks to the memory of each."""
    if WORLD == 1:
        tl.store(scores_ptr + offsets, scores, mask=mask)
    else:
        for rank in tl.static_range(WORLD):
            memory = tl.load(memories_ptr + rank).to(tl.pointer_type(tl.float32))
            tl.store(memory + offsets, scores, mask=mask)


@triton.jit(do_not_specialize=["rank", "num_rows"])
def _sum_votes_kernel(
    num_candidates_ptr,
    memories_ptr,
    summed_ptr,
    arrivals_ptr,
    scores_ptr,
    maxima_ptr,
    rank,
    num_rows,
    first_place,
    stride_place,
    WORLD: tl.constexpr,
    TILE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    TAKE: tl.constexpr,
    ROWS: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    start_next(PDL)
    row = tl.program_id(1)
    program = tl.program_id(0)
    # All ranks see the same rows: where nobody votes, nobody waits.
    if first_tile_of(num_rows, num_candidates_ptr, ROWS, TILE) > 0:
        count = tl.load(summed_ptr) + 1
        if (row == 0) & (program == 0):
            for other in tl.static_range(WORLD):
                flags_ptr = tl.load(memories_ptr + other).to(tl.pointer_type(tl.int64))
                tl.atomic_xchg(flags_ptr + rank, count.to(tl.int64), sem="release", scope="sys")
        num_candidates = tl.load(num_candidates_ptr + row)
        if num_candidates > 0:
            own_flags_ptr = tl.load(memories_ptr + rank).to(tl.pointer_type(tl.int64))
            for other in tl.static_range(WORLD):
                # Another rank may be one sum ahead, whose votes are in the other place.
                said = tl.atomic_add(own_flags_ptr + other, 0, sem="acquire", scope="sys").to(tl.int32)
                while said - count < 0:
                    said = tl.atomic_add(own_flags_ptr + other, 0, sem="acquire", scope="sys").to(tl.int32)
            own_ptr = tl.load(memories_ptr + rank).to(tl.pointer_type(tl.float32))
            start = first_tile_of(row, num_candidates_ptr, ROWS, TILE).to(tl.int64) * TILE
            lanes = tl.arange(0, TAKE)
            best = tl.full([TAKE], -1, tl.int64)
            for offset in range(program * TAKE, num_candidates, tl.num_programs(0) * TAKE):
                candidates = offset + lanes
                inside = candidates < num_candidates
                total = tl.zeros([TAKE], tl.float32)
                for other in tl.static_range(WORLD):
                    place = place_of_scores(count, other, first_place, stride_place, WORLD)
                    total += tl.load(own_ptr + place + start + candidates, mask=inside, other=0, cache_modifier=".cg")
                tl.store(scores_ptr + start + candidates, total, mask=inside)
                best = tl.maximum(best, vote_keys(total, candidates, inside))
            groups = row.to(tl.int64) * NUM_GROUPS + (program * TAKE + lanes) % NUM_GROUPS
            tl.atomic_max(maxima_ptr + groups, best, mask=best >= 0, sem="relaxed")
        # Others may still be about to read `summed`: the last program moves it on.
        if tl.atomic_add(arrivals_ptr, 1, sem="acq_rel") == tl.num_programs(0) * tl.num_programs(1) - 1:
            tl.store(arrivals_ptr, 0)
            tl.store(summed_ptr, count)


def sum_votes(rows: SelectionRows, num_rows: int, workspace: Workspace, exchange: VoteExchange) -> None:
    """Adds up what every rank's :func:`vote` has sent, into the workspace's scores, for :func:`emit`.

    Waits on the device for the other ranks, unless no row votes.
    """
    programs, take = workspace.take_programs(num_rows)
    layout = exchange.layout
    _sum_votes_kernel[(programs, num_rows)](
        rows.num_candidates,
        exchange.addresses,
        exchange.summed,
        exchange.arrivals,
        workspace.scores,
        workspace.maxima,
        exchange.rank,
        num_rows,
        layout.first_place,
        layout.place_size,
        WORLD=layout.world_size,
        TILE=TILE,
        NUM_GROUPS=workspace.limits.num_groups,
        TAKE=take,
        ROWS=rows_block(num_rows),
        PDL=workspace.pdl,
        launch_pdl=workspace.pdl,
        num_warps=4,
    )
