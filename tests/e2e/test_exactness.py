# SPDX-License-Identifier: Apache-2.0
"""The exactness laws of the spec, on real servers under mixed traffic.

Law 1: with a budget beyond the context, greedy tokens equal the dense backend's, whatever the
chunks, radix hits, retractions and aborts. Laws 3 and 4 are in test_sparse_laws.py.
"""

from __future__ import annotations

import re

import pytest
from models import write_model
from traffic import COMPACT, RETRACT, TIGHT, TOKEN_SERVER, WHOLE, Aborts, generate, mixed_requests

from sglang_tokenselect.server_process import ServerProcess

REQUESTS = mixed_requests(200, longest=900, seed=1)


def dense_answers(model, requests):
    with ServerProcess(model, *TOKEN_SERVER, backend="torch_native") as server:
        return generate(server, requests, concurrency=8)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("llama"), "Llama")


@pytest.fixture(scope="module")
def llama_answers(llama):
    return dense_answers(llama, REQUESTS)


@pytest.mark.parametrize("positions", [(), COMPACT], ids=["absolute", "compact"])
def test_200_mixed_requests_equal_dense(llama, llama_answers, positions):
    with ServerProcess(llama, *TOKEN_SERVER, *WHOLE, *TIGHT, *positions, env=RETRACT) as server:
        with Aborts(server, REQUESTS[:12]) as aborts:
            answers = generate(server, REQUESTS, concurrency=24)
        log, counters = server.log_path.read_text(), server.counters()
    assert answers == llama_answers
    assert counters["votes"] == counters["block_votes"] == 0
    assert aborts.count > 0
    assert re.search(r"#retracted_reqs: [1-9]", log)
    assert re.search(r"#cached-token: [1-9]", log)


@pytest.fixture(scope="module", params=[pytest.param("Qwen2", marks=pytest.mark.smoke), "Qwen3"])
def qwen(request, tmp_path_factory):
    """A model of the architecture, and what dense attention answers with it."""
    model = write_model(tmp_path_factory.mktemp(request.param), request.param)
    return model, dense_answers(model, REQUESTS[:40])


@pytest.mark.parametrize("positions", [(), COMPACT], ids=["absolute", "compact"])
def test_qwen_equals_dense(qwen, positions):
    model, expected = qwen
    with ServerProcess(model, *TOKEN_SERVER, *WHOLE, "--chunked-prefill-size", "96", *positions) as server:
        assert generate(server, REQUESTS[:40], concurrency=8) == expected
