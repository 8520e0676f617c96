# SPDX-License-Identifier: Apache-2.0
"""Scratch memory of selection: sized once, for stated maxima, and never allocated in a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import triton

TILE = 128
"""Candidates scored at once; a row's scores are stored in whole tiles."""

SUBTILE = 32
"""Candidates that share one softmax reference: as many as one warp scores, so that warps need not meet."""

MAX_BUDGET = 8192
LEAST = -1e30
"""Stands in for the maximum of nothing: minus infinity would make NaN of itself."""

SCORE_PROGRAMS = 2
"""Scoring programs for each multiprocessor: as many as its shared memory holds."""

MAX_SEGMENTS = 64
"""Programs that compact one row's candidates, at most; each owns one segment of the row."""


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

    @property
    def tiles_per_row(self) -> int:
        return triton.cdiv(self.max_seq_len, TILE)

    @property
    def num_tiles(self) -> int:
        """Tiles held at once; each row may waste part of its last one."""
        return triton.cdiv(self.max_candidates, TILE) + self.max_rows

    @property
    def part_tiles(self) -> int:
        """Rows whose first tile falls in the same run of so many tiles are done in one part."""
        return self.num_tiles - self.tiles_per_row + 1

    def num_parts(self, num_rows: int) -> int:
        """Parts that any batch of ``num_rows`` rows fits in."""
        return (num_rows - 1) * self.tiles_per_row // self.part_tiles + 1

    def count_parts(self, num_candidates: Sequence[int]) -> int:
        """Parts that rows with so many candidates need, 1 at least.

        Rows that turn out to have fewer need no more parts: the first tiles of those behind them only fall.

        Args:
            num_candidates: of each row, in order of the rows; a row with 0 needs no part of its own.
        """
        first_tiles = zip(count_tiles(num_candidates), num_candidates, strict=False)
        return max((first for first, count in first_tiles if count), default=0) // self.part_tiles + 1

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
        self.segments = torch.empty(tiles, TILE, dtype=torch.int64, device=device)
        self.segment_len = torch.empty(rows, MAX_SEGMENTS, dtype=torch.int32, device=device)
        self.shortlist = torch.empty(tiles, TILE, dtype=torch.int64, device=device)
        # Largest key of each group; -1 between calls.
        self.maxima = torch.full((rows, limits.num_groups), -1, dtype=torch.int64, device=device)
        # Programs that are done with their segment; the last one chooses, and sets this back to 0.
        self.arrivals = torch.zeros(rows, dtype=torch.int32, device=device)


class DecodeWorkspace(Workspace):
    """A workspace that also holds the softmax terms of decode: ``2 * num_qo_heads`` bytes more a candidate."""

    def __init__(
        self, limits: WorkspaceLimits, num_qo_heads: int, num_kv_heads: int, device: torch.device | str
    ) -> None:
        """
        Raises:
            ValueError: heads that do not divide.
        """
        if num_qo_heads % num_kv_heads:
            raise ValueError(f"num_qo_heads: expected a multiple of {num_kv_heads}, got {num_qo_heads}")
        super().__init__(limits, device)
        self.num_qo_heads, self.num_kv_heads = num_qo_heads, num_kv_heads
        runs = max(SCORE_PROGRAMS * self.num_multiprocessors // num_kv_heads, 1)
        self.score_programs = runs * num_kv_heads
        rows, tiles = limits.max_rows, limits.num_tiles
        self.terms = torch.empty(tiles, num_qo_heads, TILE, dtype=torch.bfloat16, device=device)
        self.subtile_max = torch.empty(tiles, num_qo_heads, TILE // SUBTILE, dtype=torch.float32, device=device)
        self.partial_max = torch.empty(runs + rows, num_qo_heads, dtype=torch.float32, device=device)
        self.partial_sum = torch.empty(runs + rows, num_qo_heads, dtype=torch.float32, device=device)
        self.partition = torch.empty(2, dtype=torch.int32, device=device)
