# SPDX-License-Identifier: Apache-2.0
"""Questions that branch off one context, decoded in one batch, get the answers that each gets alone.

On a GPU, where requests that share a prefix are scored together: test_gpu_servers.py.
"""

from __future__ import annotations

import pytest
from traffic import AT_ONCE, answer_alone, answer_at_once, counted, fork, fork_of_forks

from sglang_tokenselect.demo_questions import token_counter
from sglang_tokenselect.needle import checkpoint_path
from sglang_tokenselect.needle_server import needle_server

COUNT_TOKENS = token_counter(checkpoint_path())
WINDOW = 640
BRANCHES = {
    "fork": fork(2800, 1, COUNT_TOKENS),
    "fork of forks": fork_of_forks(2000, 1100, 1, COUNT_TOKENS),
}


@pytest.fixture(scope="module")
def server():
    with needle_server(False, *AT_ONCE, "--decode-log-interval", "1") as server:
        yield server


@pytest.mark.parametrize("branches", BRANCHES.values(), ids=BRANCHES.keys())
def test_branches_answer_at_once_as_each_alone(server, branches):
    alone, counters_alone = counted(server, lambda: answer_alone(server, branches))
    begin = len(server.log_path.read_text())
    at_once, counters = counted(server, lambda: answer_at_once(server, branches))
    assert all(branch.answer in answer for branch, answer in zip(branches, alone, strict=True)), alone
    assert at_once == alone
    assert counters["attended_tokens"] == WINDOW * counters["decode_queries"]
    assert counters["block_votes"] < counters_alone["block_votes"] / 3, "the shared texts were not read once"
    assert f"Decode batch, #running-req: {len(branches)}," in server.log_path.read_text()[begin:]
