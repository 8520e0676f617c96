# SPDX-License-Identifier: Apache-2.0
"""Batches of requests in a paged pool, for kernel tests: poisoned wherever nobody may read."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from accelerator import DEVICE

from sglang_tokenselect.kernels.paged_keys import PagedKeys
from sglang_tokenselect.kernels.reference.vote import soft_vote
from sglang_tokenselect.kernels.reference.window import Window
from sglang_tokenselect.kernels.rows import SelectionRows
from sglang_tokenselect.kernels.select_decode import DecodePart, select_decode
from sglang_tokenselect.kernels.selection_cache import DecodeBatch, Probe, SelectionCache
from sglang_tokenselect.kernels.shared_plan import SharedPlan, SharedPrefixes
from sglang_tokenselect.kernels.shared_segment import SharedSegment
from sglang_tokenselect.kernels.vote_exchange import VoteExchange
from sglang_tokenselect.kernels.workspace import DecodeWorkspace, Workspace, WorkspaceLimits

UNWRITTEN = -7
# Terms are kept in bfloat16: 2**-9 of each vote, twice that where the interpreter cuts digits off.
SCORE_RTOL = 1e-2


def poison(workspace: Workspace) -> None:
    """Garbage wherever a call may not expect anything; what it may expect is stated in the class."""
    for name, tensor in vars(workspace).items():
        if isinstance(tensor, torch.Tensor) and name not in ("maxima", "arrivals", "shared_arrivals"):
            tensor.fill_(torch.nan if tensor.is_floating_point() else 2**30 - 1)


def poison_entries(cache: SelectionCache) -> None:
    """Garbage in entries that hold no vote."""
    cache.query.fill_(torch.nan)
    cache.vote.fill_(2**62)


class PagedBatch:
    """Decode requests whose slots are scattered in a pool that is NaN everywhere else.

    Rows of `req_to_token` point to a NaN slot behind the end of their request.
    """

    def __init__(
        self,
        seq_lens: list[int],
        *,
        heads: tuple[int, int] = (4, 2),
        head_dim: int = 64,
        dtype: torch.dtype = torch.float16,
        key_dtype: torch.dtype | None = None,
        k_scale: float = 1.0,
        num_rows: int | None = None,
        max_len: int | None = None,
        shared: Sequence[SharedSegment] = (),
        seed: int = 0,
    ) -> None:
        """
        Args:
            shared: positions whose slots requests have in common, parents before children.
        """
        generator = torch.Generator(DEVICE).manual_seed(seed)
        self.seq_lens, (self.num_qo_heads, num_kv_heads), self.head_dim = seq_lens, heads, head_dim
        self.max_len = max_len or max(seq_lens)
        used = len(seq_lens) * self.max_len
        order = torch.randperm(used + 17, generator=generator, device=DEVICE).to(torch.int32)
        pool = torch.randn(used + 17, num_kv_heads, head_dim, generator=generator, device=DEVICE, dtype=torch.float32)
        slots = order[:used].view(len(seq_lens), self.max_len).clone()
        for segment in shared:
            slots[list(segment.rows), segment.start : segment.end] = slots[segment.rows[0], segment.start : segment.end]
        pool[~torch.isin(torch.arange(used + 17, device=DEVICE), slots)] = torch.nan
        self.table = torch.full((num_rows or len(seq_lens) + 2, self.max_len + 5), int(order[-1]), dtype=torch.int32)
        self.table = self.table.to(DEVICE)
        rows = torch.randperm(self.table.shape[0], generator=generator, device=DEVICE)[: len(seq_lens)]
        self.req_pool_indices = rows
        for row, length, owned in zip(rows.tolist(), seq_lens, slots, strict=True):
            self.table[row, :length] = owned[:length]
            pool[owned[length:].long()] = torch.nan
        self.slots = slots
        self.keys = PagedKeys(pool.to(key_dtype or dtype), self.table, k_scale)
        self.query = torch.randn(len(seq_lens), self.num_qo_heads, head_dim, generator=generator, device=DEVICE)
        self.query = self.query.to(dtype)

    def __len__(self) -> int:
        return len(self.seq_lens)

    def of_rank(self, rank: int, world_size: int) -> PagedBatch:
        """The same requests with the heads of one rank of a tensor parallel group."""
        mine = copy.copy(self)
        mine.num_qo_heads = self.num_qo_heads // world_size
        mine.query = self.query.chunk(world_size, dim=1)[rank].contiguous()
        pool = self.keys.pool.chunk(world_size, dim=1)[rank].contiguous()
        mine.keys = PagedKeys(pool, self.keys.req_to_token, self.keys.k_scale)
        return mine

    def limits(self, max_budget: int, *, max_candidates: int | None = None) -> WorkspaceLimits:
        total = len(self) * self.max_len
        return WorkspaceLimits(len(self), max(max_candidates or total, self.max_len), self.max_len, max_budget)

    def workspace(
        self, max_budget: int, *, max_candidates: int | None = None, max_own_candidates: int | None = None
    ) -> DecodeWorkspace:
        limits = self.limits(max_budget, max_candidates=max_candidates)
        workspace = DecodeWorkspace(
            limits, self.num_qo_heads, self.keys.num_kv_heads, DEVICE, max_own_candidates=max_own_candidates
        )
        poison(workspace)
        return workspace

    def cache(self, max_budget: int, num_slots: int | None = None) -> SelectionCache:
        size = self.num_qo_heads * self.head_dim
        num_slots = len(self) if num_slots is None else num_slots
        cache = SelectionCache.create(num_slots, size, max_budget, self.query.dtype, DEVICE)
        poison_entries(cache)
        return cache

    def scores(self, row: int, seq_len: int, window: Window, *, vote_scale: float = 1.0) -> torch.Tensor:
        """[num_candidates] float64 scores of one row."""
        slots = self.slots[row, window.num_sink : seq_len - window.num_local].long()
        keys = self.keys.pool[slots].double() * self.keys.k_scale
        return soft_vote(self.query[row : row + 1].double(), keys, vote_scale=vote_scale)[0]


class DecodeStep:
    """One layer's selection state, stepped as a server would. Budget -1: the caller writes the row's slots."""

    def __init__(
        self,
        paged: PagedBatch,
        window: Window,
        *,
        budgets: list[int] | None = None,
        cache_slots: list[int] | None = None,
        max_budget: int | None = None,
        max_candidates: int | None = None,
        theta: float = 0.9,
        max_reuse: int = 64,
        vote_scale: float = 1.0,
        shared: Sequence[SharedSegment] = (),
        max_own_candidates: int | None = None,
        probe: Probe | None = None,
        layer: int = 0,
        exchange: VoteExchange | None = None,
    ) -> None:
        """
        Args:
            shared: positions that requests score together; they must have their slots in common.
        """
        self.paged, self.window, self.vote_scale, self.layer = paged, window, vote_scale, layer
        self.exchange = exchange
        self.shared = shared
        max_budget = max_budget or max([window.budget, *(budgets or [])])
        count = len(paged)

        def ints(values, dtype=torch.int32):
            return torch.tensor(values, dtype=dtype, device=DEVICE)

        self.batch = DecodeBatch(
            req_pool_indices=paged.req_pool_indices,
            seq_lens=ints(paged.seq_lens, torch.int64),
            budgets=ints(budgets or [window.budget] * count),
            cache_slots=ints(list(range(count)) if cache_slots is None else cache_slots),
            kv_indptr=ints([0] * (count + 1)),
            theta=torch.tensor([theta], device=DEVICE),
            max_reuse=ints([max_reuse]),
            probe=probe,
        )
        self.workspace = paged.workspace(
            max_budget, max_candidates=max_candidates, max_own_candidates=max_own_candidates
        )
        self.cache = paged.cache(max_budget, max(count, 1 + max(self.batch.cache_slots.tolist())))
        self.rows = SelectionRows.empty(count, DEVICE)
        self.kv_indices = torch.empty(count * paged.max_len + 64, dtype=torch.int32, device=DEVICE)

    def windows(self) -> list[Window]:
        sizes = self.window
        return [Window(sizes.num_sink, budget, sizes.num_local) for budget in self.batch.budgets.tolist()]

    def candidates(self) -> list[int]:
        """What the host knows of each row's candidates: how many it has unless it reuses a vote."""
        rows = zip(self.windows(), self.batch.seq_lens.tolist(), strict=True)
        return [n - w.num_sink - w.num_local if w.budget > 0 and n > w.size else 0 for w, n in rows]

    def plan(self) -> None:
        """What the host does once a step: where each row's slots go. Poisons what they replace."""
        rows = zip(self.windows(), self.batch.seq_lens.tolist(), strict=True)
        lengths = [n if w.budget < 0 else w.attended_length(n) for w, n in rows]
        self.batch.kv_indptr[1:] = torch.tensor(lengths, device=DEVICE).cumsum(0)
        self.kv_indices.fill_(UNWRITTEN)
        self.parts = self._cut_parts()

    def _cut_parts(self) -> list[DecodePart]:
        plan = SharedPlan.of(self.shared, self.candidates(), num_sink=self.window.num_sink, min_rows=2)
        runs = self.workspace.cut_rows(self.candidates(), plan.shared_tiles)
        if not plan.segments:
            return [DecodePart(rows) for rows in runs]
        parts = []
        for rows in runs:
            memory = torch.full((SharedPrefixes.count_ints(len(rows)),), 2**30 - 1, dtype=torch.int32)
            plan.part(rows).write(memory)
            parts.append(DecodePart(rows, SharedPrefixes.view(memory.to(DEVICE), len(rows))))
        return parts

    def launch(self) -> None:
        select_decode(
            self.paged.query,
            self.paged.keys,
            self.batch,
            self.cache,
            self.rows,
            self.workspace,
            self.kv_indices,
            num_sink=self.window.num_sink,
            num_local=self.window.num_local,
            vote_scale=self.vote_scale,
            parts=self.parts,
            layer=self.layer,
            exchange=self.exchange,
        )

    def run(self) -> list[list[int]]:
        """One step. Returns the positions that each row attends to, none of a row that the caller writes."""
        self.plan()
        self.launch()
        return self.positions()

    def positions(self) -> list[list[int]]:
        indptr = self.batch.kv_indptr.tolist()
        assert (self.kv_indices[indptr[-1] :] == UNWRITTEN).all(), "written behind the last row"
        position_of = torch.full((self.paged.keys.pool.shape[0],), -1, dtype=torch.int64, device=DEVICE)
        found = []
        rows = zip(self.batch.seq_lens.tolist(), self.batch.budgets.tolist(), strict=True)
        for row, (seq_len, budget) in enumerate(rows):
            slots = self.kv_indices[indptr[row] : indptr[row + 1]].long()
            if budget < 0:
                assert (slots == UNWRITTEN).all(), f"row {row}: written though it is the caller's"
                found.append([])
                continue
            position_of[self.paged.slots[row, :seq_len].long()] = torch.arange(seq_len, device=DEVICE)
            assert (slots >= 0).all(), f"row {row}: not all slots are written"
            found.append(position_of[slots].tolist())
            position_of[self.paged.slots[row, :seq_len].long()] = -1
        return found

    def check(self, row: int, positions: list[int], *, age: int = 0) -> None:
        """Raises unless ``positions`` are a right selection of a row whose vote is ``age`` tokens old."""
        seq_len = int(self.batch.seq_lens[row])
        window = self.windows()[row]
        if window.budget < 0:
            assert positions == []
            return
        if seq_len <= window.size:
            assert positions == list(range(seq_len))
            return
        tail = seq_len - window.num_local - age
        count = window.budget - age
        assert positions[: window.num_sink] == list(range(window.num_sink))
        assert positions[window.num_sink + count :] == list(range(tail, seq_len))
        chosen = torch.tensor(positions[window.num_sink : window.num_sink + count], dtype=torch.int64, device=DEVICE)
        assert (chosen.diff() > 0).all()
        score = self.paged.scores(row, seq_len - age, window, vote_scale=self.vote_scale)
        check_top(score, chosen - window.num_sink, count)


def check_top(score: torch.Tensor, chosen: torch.Tensor, count: int) -> None:
    """Raises unless ``chosen`` are the ``count`` best, up to those that tie within SCORE_RTOL."""
    assert chosen.numel() == count and chosen.unique().numel() == count
    if not count:
        return
    assert chosen.min() >= 0 and chosen.max() < score.numel()
    lowest = score.topk(count).values.min()
    least = score[chosen].min()
    assert least >= lowest * (1 - SCORE_RTOL) - 1e-30, f"chosen {least:.3e}, wanted {lowest:.3e} at least"
    left = torch.ones_like(score, dtype=torch.bool)
    left[chosen] = False
    most = score[left].max() if left.any() else lowest
    assert most <= lowest * (1 + SCORE_RTOL) + 1e-30, f"left out {most:.3e}, wanted {lowest:.3e} at most"
