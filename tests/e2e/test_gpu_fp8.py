# SPDX-License-Identifier: Apache-2.0
"""On a GPU: float8 keys and values beside bfloat16 ones, in absolute positions within the trained length.

One server of each, side by side, in CUDA graphs. The float8 one has scales. SGLang 0.5.17 reads a prefix without them,
so dense answers, read in chunks that have a prefix, are asked for too.
"""

from __future__ import annotations

import json
import re
import statistics
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import float8
import pytest
from accelerator import NEEDS_CUDA
from traffic import answer_texts, counted

from sglang_tokenselect.demo_questions import draw_samples, token_counter
from sglang_tokenselect.needle import checkpoint_path, tasks
from sglang_tokenselect.needle_server import needle_server

pytestmark = NEEDS_CUDA

NUM_LAYERS = json.loads((checkpoint_path() / "config.json").read_text())["num_hidden_layers"]
COUNT_TOKENS = token_counter(checkpoint_path())
SAMPLES = [sample for seed in (101, 102, 103, 104) for sample in draw_samples(4000, 8, seed, COUNT_TOKENS)]
WINDOW = 64 + 448 + 128
FLAGS = (
    *("--tokenselect-positions", "absolute", "--tokenselect-min-len", "0", "--context-length", "4096"),
    *("--chunked-prefill-size", "1024", "--cuda-graph-max-bs-decode", "16", "--decode-log-interval", "1"),
)
SCALE = 0.25
ALLOWED = 0.05
"""Share of answers that float8 may lose."""


@pytest.fixture(scope="module")
def servers(tmp_path_factory):
    scaled = float8.scaled_flags(tmp_path_factory.mktemp("scales"), NUM_LAYERS, SCALE)
    kinds = {"bf16": (), "fp8": scaled}
    with ExitStack() as stack:
        with ThreadPoolExecutor() as pool:
            made = [needle_server(False, *FLAGS, *own, device="cuda") for own in kinds.values()]
            started = list(pool.map(stack.enter_context, made))
        yield dict(zip(kinds, started, strict=True))


def score(server, options=None) -> float:
    texts = answer_texts(server, [sample.prompt for sample in SAMPLES], options=options)
    return statistics.fmean(tasks.score(text, s.answers) for text, s in zip(texts, SAMPLES, strict=True))


def test_float8_selects_and_answers_as_bfloat16_does(servers):
    scores, counters = {}, {}
    for name, server in servers.items():
        scores[name], counters[name] = counted(server, lambda server=server: score(server))
        assert re.search(r"Decode batch.*cuda graph: True", server.log_path.read_text())
    print(scores, counters)
    assert scores["bf16"] >= 0.9
    assert scores["fp8"] >= scores["bf16"] - ALLOWED
    for counted_here in counters.values():
        assert counted_here["attended_tokens"] == WINDOW * counted_here["decode_queries"]
        assert counted_here["votes"] > 0 and counted_here["block_votes"] > 0


def test_dense_requests_know_the_scales_too(servers):
    scores = {}
    for name, server in servers.items():
        scores[name], counters = counted(server, lambda server=server: score(server, {"dense": True}))
        assert counters["votes"] == counters["block_votes"] == 0
    print(scores)
    assert scores["bf16"] >= 0.9
    assert scores["fp8"] >= scores["bf16"] - ALLOWED
