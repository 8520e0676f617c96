# SPDX-License-Identifier: Apache-2.0
"""A TorchRunner over a paged pool of one layer, with all heads or with those of one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from sglang_tokenselect.config import TokenSelectConfig
from sglang_tokenselect.kernels.reference.positions import Rope
from sglang_tokenselect.planner import ForwardPlan, RequestPlan
from sglang_tokenselect.ranks import ALONE, Ranks
from sglang_tokenselect.runner import LayerInput
from sglang_tokenselect.torch_runner import TorchRunner

HEADS, KV_HEADS, DIM = 4, 2, 16
SMALL = {"sink": 4, "budget": 12, "local": 8, "block": 16, "sub_block": 4, "min_len": 0}
SCALING = 0.25

START, END = 80, 96
"""Tokens of `play` whose queries come in decode steps."""


class Server:
    """A paged pool with scattered slots, NaN where nothing was written, and a runner over it; of one rank's heads."""

    def __init__(self, num_rows: int = 4, max_len: int = 256, ranks: Ranks = ALONE, **options) -> None:
        torch.manual_seed(0)
        config = TokenSelectConfig(**{**SMALL, **options})
        num_slots = num_rows * max_len + 1
        self.ranks = ranks
        self.pools = torch.full((2, num_slots, KV_HEADS // ranks.world_size, DIM), torch.nan, dtype=torch.float64)
        self.req_to_token = torch.randperm(num_slots - 1).add(1)[: num_rows * max_len].view(num_rows, max_len).int()
        ropes = {0: Rope.from_theta(1e4, DIM, max_len, dtype=torch.float64)} if config.is_compact else {}
        self.runner = TorchRunner(config, self.req_to_token, ropes, ranks=ranks)
        self.layer = LayerInput(0, self.pools[0], self.pools[1], scaling=SCALING, logit_cap=0.0)

    def forward(self, *parts, is_decode=False, prompt_len=None):
        """Each part is (row, start, tokens) with tokens = (query, key, value) of [m, heads of all ranks, dim].

        Args:
            prompt_len: of each request; None: all of it is prompt.
        """
        requests, queries, first = [], [], 0
        for row, start, of_all_ranks in parts:
            query, key, value = (x.chunk(self.ranks.world_size, dim=1)[self.ranks.rank] for x in of_all_ranks)
            slots = self.req_to_token[row, start : start + len(query)].long()
            self.pools[0, slots], self.pools[1, slots] = key, value
            requests.append(RequestPlan(row, start + len(query), first, len(query), prompt_len=prompt_len))
            queries.append(query)
            first += len(query)
        self.runner.begin(ForwardPlan(is_decode, tuple(requests)))
        return list(self.runner.run(torch.cat(queries), self.layer).split([len(q) for q in queries]))

    def decode(self, row, start, tokens):
        return self.forward((row, start, tokens), is_decode=True)[0]


def tokens(count: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(count, HEADS, DIM), (count, KV_HEADS, DIM), (count, KV_HEADS, DIM)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def part(of, lo, hi):
    return [x[lo:hi] for x in of]


def play(options: dict[str, Any], ranks: Ranks = ALONE) -> tuple[list[np.ndarray], list[list[int]], dict[str, int]]:
    """A prefill in two chunks and decode steps, whose queries stay alike, or change in one half of the heads.

    Returns:
        Of each forward, the output [num_tokens, heads, dim] and the positions of the decode steps; the counters.
    """
    prompt, server = tokens(END, seed=12), Server(ranks=ranks, **options)
    outs = [*server.forward((0, 0, part(prompt, 0, 48))), *server.forward((0, 48, part(prompt, 48, START)))]
    voted = []
    for n in range(START, END):
        query, key, value = part(prompt, n, n + 1)
        noise = torch.full((2, HEADS // 2), 0.01)
        if n % 4 == 1:
            noise[n // 4 % 2] = 3.0
        outs.append(server.decode(0, n, [prompt[0][START : START + 1] + noise.view(-1, 1) * query, key, value]))
        voted.append(server.runner._cached[0][0].ranked.tolist())
    return [out.numpy() for out in outs], voted, server.runner.counters.to_dict()


def play_rank(rank: int, folder: Path, cases: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """`play` for each case, in a process that is one of two ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2)
    ranks = Ranks(rank, 2, dist.group.WORLD)
    return {name: play(options, ranks) for name, options in cases.items()}
