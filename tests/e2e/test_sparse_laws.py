# SPDX-License-Identifier: Apache-2.0
"""Laws 3 and 4 where selection is at work: neighbours, chunks and the way not to reuse change nothing."""

from __future__ import annotations

import re

import pytest
from models import write_model
from traffic import SPARSE, TOKEN_SERVER, generate, unshared_requests

from sglang_tokenselect.server_process import ServerProcess


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
