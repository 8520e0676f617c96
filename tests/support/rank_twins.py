# SPDX-License-Identifier: Apache-2.0
"""Decode steps of the ranks of a tensor parallel group, a process each, which meet in memory that they share."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerator import DEVICE
from paged import DecodeStep, PagedBatch

from sglang_tokenselect.kernels.reference.window import Window
from sglang_tokenselect.kernels.vote_exchange import ExchangeLayout, VoteExchange


@dataclass(frozen=True)
class Scene:
    """Steps of one batch.

    Attributes:
        seq_lens: of each step.
        changed: of each step, how much of noise is added to the queries of each half of the heads.
        paged, step: arguments of PagedBatch and DecodeStep.
    """

    window: Window
    seq_lens: Sequence[Sequence[int]]
    changed: Sequence[tuple[float, float]] = ((0.0, 0.0),)
    paged: dict[str, Any] = field(default_factory=dict)
    step: dict[str, Any] = field(default_factory=dict)

    def make(self, rank: int = 0, world_size: int = 1, exchange: VoteExchange | None = None) -> DecodeStep:
        longest = max(max(lens) for lens in self.seq_lens)
        paged = PagedBatch(list(self.seq_lens[0]), max_len=longest, **self.paged)
        # Steps see all slots of their requests.
        for row, slots in zip(paged.req_pool_indices.tolist(), paged.slots, strict=True):
            paged.table[row, :longest] = slots
            missing = paged.keys.pool[slots.long()].isnan()
            paged.keys.pool[slots.long()] = torch.where(missing, 0.25, paged.keys.pool[slots.long()])
        paged = paged.of_rank(rank, world_size) if world_size > 1 else paged
        return DecodeStep(paged, self.window, exchange=exchange, **self.step)

    def queries(self, rank: int = 0, world_size: int = 1) -> list[torch.Tensor]:
        """[num_rows, num_qo_heads, head_dim] of each step."""
        base = PagedBatch(list(self.seq_lens[0]), **self.paged).query
        noise = torch.randn(base.shape, generator=torch.Generator().manual_seed(1)).to(base)
        halves = base.shape[1] // 2
        queries = []
        for first, second in self.changed:
            factor = torch.tensor([first] * halves + [second] * (base.shape[1] - halves)).to(base)
            queries.append(base + factor[:, None] * noise)
        return [query.chunk(world_size, dim=1)[rank].contiguous() for query in queries]

    def play(self, step: DecodeStep, queries: Sequence[torch.Tensor]) -> list[list[list[int]]]:
        """Positions of each row in each step."""
        played = []
        for lens, query in zip(self.seq_lens, queries, strict=True):
            step.batch.seq_lens.copy_(torch.tensor(lens))
            step.paged.query = query
            played.append(step.run())
        return played


def play_alone(scene: Scene) -> tuple[DecodeStep, list[list[list[int]]]]:
    """With all heads in one process."""
    step = scene.make()
    return step, scene.play(step, scene.queries())


class Ranks:
    """Processes that each play one rank, scene after scene."""

    def __init__(self, world_size: int = 2) -> None:
        context = multiprocessing.get_context("spawn")
        self._processes = [context.Pool(1) for _ in range(world_size)]

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self._processes:
            process.terminate()

    def play(self, scene: Scene, folder: Path) -> list[tuple[list[list[list[int]]], list[int]]]:
        """Of each rank: positions of each row in each step, and votes reused and made."""
        world_size = len(self._processes)
        jobs = [
            process.apply_async(_play_rank, (scene, rank, world_size, folder))
            for rank, process in enumerate(self._processes)
        ]
        return [job.get(timeout=300) for job in jobs]


def _play_rank(scene: Scene, rank: int, world_size: int, folder: Path) -> tuple[list[list[list[int]]], list[int]]:
    torch.set_num_threads(1)
    if DEVICE == "cuda":
        torch.cuda.set_device(rank)
    limits = scene.make(rank, world_size).workspace.limits
    layout = ExchangeLayout.of(world_size, limits)
    exchange = open_exchange(rank, layout, folder)
    step = scene.make(rank, world_size, exchange)
    played = scene.play(step, scene.queries(rank, world_size))
    assert (exchange.arrivals == 0).all() and (step.workspace.maxima == -1).all()
    return played, step.cache.counters.tolist()


def open_exchange(rank: int, layout: ExchangeLayout, folder: Path) -> VoteExchange:
    """On GPUs as a server opens it; without, in a file that all ranks map."""
    if DEVICE == "cuda":
        from sglang_tokenselect.peer_memory import open_exchange

        if not torch.distributed.is_initialized():
            where = f"file://{folder}/group"
            torch.distributed.init_process_group("nccl", init_method=where, rank=rank, world_size=layout.world_size)
        return open_exchange(torch.distributed.group.WORLD, layout, torch.device("cuda", rank))
    memories = [
        torch.from_file(str(folder / f"rank{other}"), shared=True, size=layout.num_words, dtype=torch.int64)
        for other in range(layout.world_size)
    ]
    exchange = VoteExchange(rank, layout, [memory.data_ptr() for memory in memories], memories[rank])
    exchange.mapped = memories  # as long as it is used
    return exchange
