# SPDX-License-Identifier: Apache-2.0
"""Real servers, in which each layer of each forward finds the shared slots where the plan says they are."""

from __future__ import annotations

import random
import re

import pytest
from models import write_model
from prefix_oracle import server_env
from traffic import RETRACT, SPARSE, TOKEN_SERVER, Aborts, Request, generate

from sglang_tokenselect.server_process import ServerProcess

FLAGS = (
    *(*TOKEN_SERVER, *SPARSE, "--tokenselect-block", "128"),
    *("--tokenselect-min-group", "2", "--tokenselect-min-shared", "0"),
    # The prompts have 15,000 tokens that differ, so the tree has to evict.
    *("--chunked-prefill-size", "1024", "--max-total-tokens", "9000", "--max-running-requests", "6"),
)


def branching_requests():
    """Forks of two stems, at depths that are no multiples of anything."""
    rng = random.Random(5)

    def tokens(count):
        return [rng.randrange(3, 500) for _ in range(count)]

    trunk = tokens(2300)
    stems = [trunk, trunk + tokens(1500), trunk + tokens(2100), tokens(2500)]
    tails = [tokens(rng.randint(1, 300)) for _ in range(28)]
    order = [0, 1, 1, 1, 0, 2, 2, 1, 3, 3, 3, 2, 1, 1]
    return [Request(stems[order[n % len(order)]] + tail, rng.randint(4, 24)) for n, tail in enumerate(tails)]


REQUESTS = branching_requests()


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("llama"), "Llama", max_position_embeddings=8192)


LOOPS = {"overlap": (), "normal": ("--disable-overlap-schedule",)}


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS.keys())
def test_every_forward_shares_what_the_plan_says(llama, tmp_path, loop):
    """A forward whose plan is wrong ends the server."""
    with ServerProcess(llama, *FLAGS, *loop, env={**RETRACT, **server_env(tmp_path)}) as server:
        with Aborts(server, REQUESTS[:4], pause=1.0) as aborts:
            answers = generate(server, REQUESTS, concurrency=8)
        log, counters = server.log_path.read_text(), server.counters()
    assert [len(answer) for answer in answers] == [request.max_new_tokens for request in REQUESTS]
    assert aborts.count > 0
    assert re.search(r"#retracted_reqs: [1-9]", log)
    assert counters["shared_queries"] > 0
    seen = set((tmp_path / "log").read_text().splitlines())
    assert {"decode flat", "decode deep", "extend flat"} <= seen


def test_nothing_is_shared_without_a_tree(llama, tmp_path):
    with ServerProcess(llama, *FLAGS, "--disable-radix-cache", env=server_env(tmp_path)) as server:
        generate(server, [REQUESTS[0], REQUESTS[4]], concurrency=2)  # of one stem
        log, counters = server.log_path.read_text(), server.counters()
    assert counters["decode_queries"] > 0 and counters["shared_queries"] == 0
    assert not (tmp_path / "log").exists()
    assert "not a radix tree" not in log


def test_nothing_is_shared_that_saves_too_little(llama):
    """By default 65,536 tokens, and these requests have fewer in all."""
    with ServerProcess(llama, *FLAGS, "--tokenselect-min-shared", "65536") as server:
        generate(server, REQUESTS[:6], concurrency=6)
        counters = server.counters()
    assert counters["decode_queries"] > 0 and counters["shared_queries"] == 0
