# SPDX-License-Identifier: Apache-2.0
"""Two processes with half of the heads each, joined by gloo, choose what one with all heads does."""

from __future__ import annotations

import multiprocessing
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch_server import play, play_rank

from sglang_tokenselect.config import TokenSelectConfig
from sglang_tokenselect.ranks import ALONE, Ranks

OPTIONS = {
    "absolute": {},
    "compact": {"positions": "compact"},
    "sum": {"combine": "sum"},
    "page": {"selector": "page"},
    "window": {"selector": "window"},
}


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """What each rank returned."""
    folder = tmp_path_factory.mktemp("gloo")
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as first, context.Pool(1) as second:
        jobs = [pool.apply_async(play_rank, (rank, folder, OPTIONS)) for rank, pool in enumerate((first, second))]
        return [job.get(timeout=60) for job in jobs]


@pytest.mark.parametrize("name", OPTIONS)
def test_two_ranks_choose_what_one_does(played, name):
    outs, voted, counters = play(OPTIONS[name])
    parts = [rank[name] for rank in played]
    for each in parts:
        assert each[1:] == (voted, counters)
    halves = zip(parts[0][0], parts[1][0], strict=True)
    for out, half in zip(outs, halves, strict=True):
        np.testing.assert_allclose(np.concatenate(half, axis=1), out)
    assert counters["reuses"] > 4 and counters["votes"] > 4 and counters["block_votes"] > 2


def test_alone_they_would_choose_otherwise():
    """So the ranks above did exchange something."""
    halves = [play({}, SimpleNamespace(rank=rank, world_size=2, sum_=lambda tensor: tensor)) for rank in range(2)]
    _, voted, counters = play({})
    for _, half_voted, half_counters in halves:
        assert half_voted != voted and half_counters["reuses"] != counters["reuses"]


@pytest.mark.parametrize(("tp_size", "vote"), [(1, "global"), (1, "local"), (2, "local")])
def test_nobody_is_asked(tp_size, vote):
    assert Ranks.of_server(SimpleNamespace(tp_size=tp_size), TokenSelectConfig(vote=vote)) is ALONE
    tensor = torch.ones(3)
    assert ALONE.sum_(tensor) is tensor and tensor.eq(1).all()


def test_the_group_is_sglangs_of_attention(monkeypatch):
    group = SimpleNamespace(rank_in_group=1, world_size=2, device_group=object())
    monkeypatch.setattr("sglang.srt.distributed.parallel_state.get_attn_tp_group", lambda: group)
    assert Ranks.of_server(SimpleNamespace(tp_size=2), TokenSelectConfig()) == Ranks(1, 2, group.device_group)
