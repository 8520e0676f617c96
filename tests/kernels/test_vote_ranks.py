# SPDX-License-Identifier: Apache-2.0
"""Ranks that hold some of the heads choose what all heads choose: in the interpreter, and on two GPUs."""

from __future__ import annotations

import pytest
import torch
from accelerator import DEVICE, HAS_CUDA
from rank_twins import Ranks, Scene, play_alone

from sglang_tokenselect.kernels.reference.window import Window
from sglang_tokenselect.kernels.shared_segment import SharedSegment
from sglang_tokenselect.kernels.vote_exchange import ExchangeLayout, VoteExchange

WINDOW = Window(num_sink=5, budget=40, num_local=12)
LENS = [1, 300, 57, 58, 431]
TWO_RANKS = pytest.mark.skipif(HAS_CUDA and torch.cuda.device_count() < 2, reason="needs two GPUs, or none")

# Half of the heads changes its mind: the cosine over all heads is about 0.85, of each half alone 1 and 0.7.
HALF_CHANGED = ((0.0, 0.0), (0.0, 1.0), (1.0, 1.0))
GROWING = [LENS, [n + 1 for n in LENS], [n + 2 for n in LENS]]

SCENES = {
    "lengths": Scene(WINDOW, [LENS]),
    "all-reuse": Scene(WINDOW, GROWING, HALF_CHANGED, step={"theta": 0.5}),
    "none-reuses": Scene(WINDOW, GROWING, HALF_CHANGED, step={"theta": 0.999}),
    "between": Scene(WINDOW, GROWING, HALF_CHANGED, step={"theta": 0.75}),
    "no-entries": Scene(WINDOW, GROWING, HALF_CHANGED, step={"cache_slots": [-1] * 5}),
    "some-are-the-callers": Scene(WINDOW, GROWING, HALF_CHANGED, step={"budgets": [40, -1, 40, 0, 17]}),
    "nobody-votes": Scene(WINDOW, [[1, 57, 30]] * 3, HALF_CHANGED),
    "parts": Scene(WINDOW, [[500, 57, 320, 444]] * 2, HALF_CHANGED[:2], step={"max_candidates": 500, "theta": 2.0}),
    "ties": Scene(WINDOW, [[500, 301]] * 2, [(0.0, 0.0)] * 2, step={"vote_scale": 1e-30, "theta": 2.0}),
    "heads-of-their-own": Scene(WINDOW, [[300, 431]], paged={"heads": (6, 2), "head_dim": 128}),
    "shared-prefix": Scene(
        WINDOW,
        [[700, 650, 640, 300]] * 2,
        HALF_CHANGED[:2],
        paged={"shared": [SharedSegment((0, 1, 2), 0, 600)]},
        step={"shared": [SharedSegment((0, 1, 2), 0, 600)], "theta": 0.999},
    ),
}


@pytest.fixture(scope="module")
def ranks():
    with Ranks() as processes:
        yield processes


@TWO_RANKS
@pytest.mark.parametrize("name", SCENES)
def test_ranks_choose_what_all_heads_choose(name, ranks, tmp_path):
    scene = SCENES[name]
    first, second = ranks.play(scene, tmp_path)
    assert first == second
    played, counters = first
    step, alone = play_alone(scene)
    for lens, query, rows, expected in zip(scene.seq_lens, scene.queries(), played, alone, strict=True):
        step.batch.seq_lens.copy_(torch.tensor(lens))
        for row, positions in enumerate(rows):
            if positions != expected[row]:  # then by a tie
                step.paged.query = query
                step.check(row, positions)
    assert counters == step.cache.counters.tolist()


def test_the_scenes_reuse_as_their_names_say():
    """What the cosines of the scenes are for: else ranks that ask nobody would do as well."""
    for name, expected in {"all-reuse": 7, "none-reuses": 0, "between": 4}.items():
        step, _ = play_alone(SCENES[name])
        assert step.cache.counters.tolist()[0] == expected, name


@pytest.mark.parametrize(
    ("addresses", "size", "message"),
    [
        ([1], 0, r"addresses: expected 2, rank 0 among them, got 1"),
        ([1, 2], 1, r"memory: expected \d+ int64, got \(\d+,\) torch.int64"),
    ],
)
def test_refusals(addresses, size, message):
    layout = ExchangeLayout(world_size=2, max_rows=3, num_tiles=4)
    memory = torch.zeros(layout.num_words + size, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match=message):
        VoteExchange(0, layout, addresses, memory)
