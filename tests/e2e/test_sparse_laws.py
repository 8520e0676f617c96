# SPDX-License-Identifier: Apache-2.0
"""Laws 3 and 4 where selection is at work: neighbours, chunks and the way not to reuse change nothing."""

from __future__ import annotations

import random
import re

import pytest
from models import write_model
from traffic import TOKEN_SERVER, Request, generate

from sglang_tokenselect.server_process import ServerProcess

SPARSE = (
    *("--tokenselect-sink", "16", "--tokenselect-budget", "48", "--tokenselect-local", "32"),
    *("--tokenselect-block", "32", "--tokenselect-sub-block", "8", "--tokenselect-min-len", "0"),
)


def unshared_requests(count: int) -> list[Request]:
    """No common prefixes: a radix hit inside a block shortens that block, which the spec allows."""
    rng = random.Random(3)
    lengths = [97, 128, 129, *(rng.randint(1, 1200) for _ in range(count - 3))]
    return [Request([rng.randrange(3, 512) for _ in range(n)], rng.randint(2, 12)) for n in lengths]


@pytest.mark.parametrize("positions", ["absolute", "compact"])
def test_neighbours_chunks_and_the_way_not_to_reuse_change_nothing(tmp_path, positions):
    model = write_model(tmp_path, "Llama")
    requests = unshared_requests(40)
    flags = (*TOKEN_SERVER, *SPARSE, "--tokenselect-positions", positions)
    alone = ("--chunked-prefill-size", "512", "--tokenselect-max-reuse", "1")
    crowded = ("--chunked-prefill-size", "96", "--tokenselect-theta", "1.1")
    with ServerProcess(model, *flags, *alone) as server:
        expected, counters_alone = generate(server, requests, concurrency=1), server.counters()
    with ServerProcess(model, *flags, *crowded) as server:
        answers, counters = generate(server, requests, concurrency=16), server.counters()
        log = server.log_path.read_text()
    assert answers == expected
    assert re.search(r"#running-req: ([2-9]|1\d)", log), "the requests did not run side by side"
    assert counters_alone["votes"] > 0 and counters_alone["block_votes"] > 0
    assert counters["reuses"] == counters_alone["reuses"] == 0
