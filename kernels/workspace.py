# SPDX-License-Identifier: Apache-2.0
"""Scratch memory of selection: sized once, for stated maxima, and never allocated in a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import triton

from .shared_segment import MAX_MEMBERS, MAX_SEGMENTS

TILE = 128
"""Candidates scored at once; a row's scores are stored in whole tiles."""

SUBTILE = 32
"""Candidates that share one softmax reference: as many as one warp scores, so that warps need not meet."""

MAX_BUDGET = 8192
LEAST = -1e30
"""Stands in for the maximum of nothing: minus infinity would make NaN of itself."""

SCORE_PROGRAMS = 2
"""Scoring programs for each multiprocessor: as many as its shared memory holds."""

SHARED_PROGRAMS = 2
"""Programs for each multiprocessor that score what rows share."""

CHUNK_QUERIES = 128
"""Queries, of all rows and heads of a group, that are scored against a tile of shared keys at once; a row at least."""

CHUNK_FIELDS = 8
"""Numbers kept of a chunk, rounded up."""

MAX_SHARED_KV_HEADS = 8
"""KV heads whose scores of shared tiles the scratch holds. Rows of models with more are scored apart."""

TAKE = 1024
"""Scores that a program looks at at once, where they are there already."""

TAKE_PROGRAMS = 4
"""Programs for each multiprocessor that look at such scores."""

MAX_RUNS = 64
"""Programs that compact one row's candidates, at most; each owns one run of the row."""


def previous_power_of_2(x: int) -> int:
    return 1 << (max(x, 1).bit_length() - 1)


def count_multiprocessors(device: torch.device | str) -> int:
    """Multiprocessors that share the work. Device "meta" stands for the GPU that is there, if any."""
    device = torch.device(device)
    if device.type == "meta" and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    if device.type != "cuda":
        return 3  # the interpreter: few, and odd, so that work is cut at odd places
    return torch.cuda.get_device_properties(device).multi_processor_count


def nbytes(owner: object) -> int:
    """Bytes of the tensors in an object's attributes, and in theirs in turn; memory that several share counts once.

    What is made on device "meta" has the same tensors, without memory: so the bytes are known before any is taken.
    """
    return sum(storage.nbytes() for storage in set(_storages(owner)))


def _storages(owner: object) -> Iterator[torch.UntypedStorage]:
    if isinstance(owner, torch.Tensor):
        yield owner.untyped_storage()
        return
    for item in owner if isinstance(owner, tuple) else getattr(owner, "__dict__", {}).values():
        yield from _storages(item)


def count_tiles(num_candidates: Sequence[int]) -> list[int]:
    """[num_rows + 1]: the first tile of each row, rows packed in order, and the number of all tiles."""
    return [0, *accumulate(triton.cdiv(count, TILE) for count in num_candidates)]


@dataclass(frozen=True)
class WorkspaceLimits:
    """What a workspace must be able to hold.

    Attributes:
        max_rows: decode requests or prefill blocks of one call.
        max_candidates: tokens scored at once, over all rows. A call with more is done in parts.
        max_seq_len: tokens of the longest request.
        max_budget: the largest budget of a row, at most 8,192.

    Raises:
        ValueError: a limit that is not possible.
    """

    max_rows: int
    max_candidates: int
    max_seq_len: int
    max_budget: int

    def __post_init__(self) -> None:
        if self.max_rows < 1:
            raise ValueError(f"max_rows: expected 1 at least, got {self.max_rows}")
        if not 1 <= self.max_budget <= MAX_BUDGET:
            raise ValueError(f"max_budget: expected 1 to {MAX_BUDGET}, got {self.max_budget}")
        if self.max_candidates < self.max_seq_len:
            raise ValueError(
                f"max_candidates: expected {self.max_seq_len}, max_seq_len, or more, got {self.max_candidates}"
            )

    def include(self, other: WorkspaceLimits) -> bool:
        """Whether a workspace of these limits serves what is planned for the others."""
        return (
            self.max_rows >= other.max_rows
            and self.max_candidates >= other.max_candidates
            and self.max_seq_len >= other.max_seq_len
            and self.max_budget >= other.max_budget
        )

    @property
    def num_tiles(self) -> int:
        """Tiles held at once; each row may waste part of its last one."""
        return triton.cdiv(self.max_candidates, TILE) + self.max_rows

    @property
    def num_groups(self) -> int:
        """Groups of candidates whose maxima bound the selection: twice the largest budget."""
        return max(2 * triton.next_power_of_2(self.max_budget), TILE)


class Workspace:
    """Device scratch of top-k within ``limits``: about 20 bytes a candidate, from scores to slots.

    One workspace serves all layers, one after the other, on one stream. ``nbytes(Workspace(limits, "meta"))`` are
    its bytes.
    """

    def __init__(self, limits: WorkspaceLimits, device: torch.device | str) -> None:
        self.limits = limits
        self.num_multiprocessors = count_multiprocessors(device)
        self.pdl = torch.device(device).type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
        rows, tiles = limits.max_rows, limits.num_tiles
        self.scores = torch.empty(tiles, TILE, dtype=torch.float32, device=device)
        self.keys = torch.empty(2, tiles, TILE, dtype=torch.int64, device=device)
        self.segments, self.shortlist = self.keys[0], self.keys[1]
        self.segment_len = torch.empty(rows, MAX_RUNS, dtype=torch.int32, device=device)
        # Largest key of each group; -1 between calls.
        self.maxima = torch.full((rows, limits.num_groups), -1, dtype=torch.int64, device=device)
        # Programs that are done with their segment; the last one chooses, and sets this back to 0.
        self.arrivals = torch.zeros(rows, dtype=torch.int32, device=device)

    def take_programs(self, num_rows: int) -> tuple[int, int]:
        """Of kernels that look at scores that are there: programs for each row, and scores of each at once.

        The candidates of a program are then always in the same groups.
        """
        num_groups = self.limits.num_groups
        take = min(TAKE, num_groups)
        programs = previous_power_of_2(TAKE_PROGRAMS * self.num_multiprocessors // num_rows)
        return max(programs, num_groups // take), take


class DecodeWorkspace(Workspace):
    """A workspace that also holds the softmax terms of decode.

    ``2 * num_qo_heads`` bytes for each candidate that a row scores by itself; those that it shares need none.
    """

    def __init__(
        self,
        limits: WorkspaceLimits,
        num_qo_heads: int,
        num_kv_heads: int,
        device: torch.device | str,
        *,
        max_own_candidates: int | None = None,
    ) -> None:
        """
        Args:
            max_own_candidates: candidates that rows score by themselves at once, ``max_seq_len`` at least; None: all.

        Raises:
            ValueError: heads that do not divide, or fewer candidates than a row may have.
        """
        if num_qo_heads % num_kv_heads:
            raise ValueError(f"num_qo_heads: expected a multiple of {num_kv_heads}, got {num_qo_heads}")
        own = limits.max_candidates if max_own_candidates is None else max_own_candidates
        if own < limits.max_seq_len:
            raise ValueError(f"max_own_candidates: expected {limits.max_seq_len}, max_seq_len, or more, got {own}")
        super().__init__(limits, device)
        self.num_own_tiles = triton.cdiv(own, TILE) + limits.max_rows
        self.num_qo_heads, self.num_kv_heads = num_qo_heads, num_kv_heads
        score_runs = max(SCORE_PROGRAMS * self.num_multiprocessors // num_kv_heads, 1)
        self.score_programs = score_runs * num_kv_heads
        rows, tiles = limits.max_rows, self.num_own_tiles
        self.terms = torch.empty(tiles, num_qo_heads, TILE, dtype=torch.bfloat16, device=device)
        self.subtile_max = torch.empty(tiles, num_qo_heads, TILE // SUBTILE, dtype=torch.float32, device=device)
        self.partial_max = torch.empty(score_runs + rows, num_qo_heads, dtype=torch.float32, device=device)
        self.partial_sum = torch.empty(score_runs + rows, num_qo_heads, dtype=torch.float32, device=device)
        self.partition = torch.empty(1, dtype=torch.int32, device=device)
        # Of shared tiles, by KV head, and where there are many in bfloat16, as the terms are. They take the place of
        # the keys, of which there are none before they are added up.
        dtype = torch.float32 if num_kv_heads <= MAX_SHARED_KV_HEADS // 2 else torch.bfloat16
        self.head_scores = self.keys.view(dtype).view(-1, *self.scores.shape)
        # Who votes, and pieces of log-sum-exp: chunks of c rows leave up to (shared_runs + chunks) * c.
        self.shared_runs = max(SHARED_PROGRAMS * self.num_multiprocessors // num_kv_heads, 1)
        pieces = (self.shared_runs + MAX_SEGMENTS) * self.chunk_rows(limits.max_rows) + MAX_MEMBERS
        self.voters = torch.empty(MAX_MEMBERS, dtype=torch.int32, device=device)
        self.num_voters = torch.empty(MAX_SEGMENTS, dtype=torch.int32, device=device)
        self.first_chunk = torch.empty(MAX_SEGMENTS, dtype=torch.int32, device=device)
        self.chunks = torch.empty(MAX_SEGMENTS + MAX_MEMBERS, CHUNK_FIELDS, dtype=torch.int32, device=device)
        self.run_chunk = torch.empty(self.shared_runs, dtype=torch.int32, device=device)
        self.num_units = torch.empty(2, dtype=torch.int32, device=device)
        # As `arrivals`, of the programs that gather voters.
        self.shared_arrivals = torch.zeros(1, dtype=torch.int32, device=device)
        self.shared_max = torch.empty(pieces, num_qo_heads, dtype=torch.float32, device=device)
        self.shared_sum = torch.empty(pieces, num_qo_heads, dtype=torch.float32, device=device)
        self.lse = torch.empty(limits.max_rows, num_qo_heads, dtype=torch.float32, device=device)
        self.first_tile = torch.empty(limits.max_rows, dtype=torch.int32, device=device)

    @property
    def group_block(self) -> int:
        """Query heads of a KV head, rounded up."""
        return triton.next_power_of_2(self.num_qo_heads // self.num_kv_heads)

    def chunk_rows(self, num_rows: int) -> int:
        """Rows that are scored against a shared tile at once: no more than there may be, no fewer than a dot takes."""
        most = CHUNK_QUERIES // self.group_block
        return max(min(most, triton.next_power_of_2(num_rows)), -(-16 // self.group_block), 1)

    def cut_rows(self, num_candidates: Sequence[int], shared_tiles: Sequence[int] | None = None) -> list[range]:
        """The rows of a batch in as few runs of neighbours as the scratch holds one after the other, one at least.

        Rows that turn out to have fewer candidates, since they reuse a vote, fit as well.

        Args:
            num_candidates: of each row at most; 0 for a row that does not vote.
            shared_tiles: tiles of each row that it scores together with others; None: none.
        """
        tiles = [-(-count // TILE) for count in num_candidates]
        own = (
            [max(all_ - shared, 0) for all_, shared in zip(tiles, shared_tiles, strict=True)] if shared_tiles else tiles
        )
        if sum(tiles) <= self.limits.num_tiles and sum(own) <= self.num_own_tiles:
            return [range(len(tiles))]
        runs, first, held, held_own = [], 0, 0, 0
        for row, (count, own_count) in enumerate(zip(tiles, own, strict=True)):
            held, held_own = held + count, held_own + own_count
            if held > self.limits.num_tiles or held_own > self.num_own_tiles:
                runs.append(range(first, row))
                first, held, held_own = row, count, own_count
        return [*runs, range(first, len(tiles))]
