# SPDX-License-Identifier: Apache-2.0
"""The shipped checkpoint on a real server, far beyond the 4,096 tokens that it was trained at."""

from __future__ import annotations

import json

import pytest
from traffic import counted

from sglang_tokenselect.demo_questions import draw_samples, token_counter
from sglang_tokenselect.needle import checkpoint_path, tasks
from sglang_tokenselect.needle_server import needle_server

COUNT_TOKENS = token_counter(checkpoint_path())
NUM_LAYERS = json.loads((checkpoint_path() / "config.json").read_text())["num_hidden_layers"]
SEEDS = (101, 102)
WINDOW = 64 + 448 + 128


def accuracy(server, length, num_questions=8):
    """Mean score over questions of two contexts; those of one context share it in the radix cache."""
    scores = []
    for seed in SEEDS:
        for sample in draw_samples(length, num_questions, seed, COUNT_TOKENS):
            sampling = {"temperature": 0.0, "max_new_tokens": 48, "stop": ["\n", "."]}
            answer = server.post("/generate", {"text": sample.prompt, "sampling_params": sampling})
            scores.append(tasks.score(answer["text"], sample.answers))
    return sum(scores) / len(scores)


@pytest.fixture(scope="module")
def tokenselect():
    with needle_server() as server:
        yield server


@pytest.mark.parametrize("length", [4096, 8192, 32768])
def test_tokenselect_finds_needles(tokenselect, length):
    score, counters = counted(tokenselect, lambda: accuracy(tokenselect, length))
    assert score >= 0.95
    assert counters["attended_tokens"] == WINDOW * counters["decode_queries"]
    assert counters["votes"] > 0
    # One long prefill a context, the other questions from the radix cache: a vote per layer and block.
    blocks = len(SEEDS) * (length - WINDOW) / 128
    assert counters["block_votes"] < (1.2 * blocks + 40) * NUM_LAYERS


def test_the_same_without_choosing_finds_nothing(tokenselect):
    """The latest tokens, as many: what is found is found by the votes."""
    with needle_server(False, "--tokenselect-selector", "window") as server:
        score, counters = counted(server, lambda: accuracy(server, 8192))
    assert score <= 0.25
    assert counters["attended_tokens"] == WINDOW * counters["decode_queries"]


@pytest.mark.parametrize("selector", ["page", "mean"])
def test_other_policies_find_some(selector):
    with needle_server(False, "--tokenselect-selector", selector) as server:
        assert accuracy(server, 8192) >= 0.5


def test_dense_attention_is_lost_there():
    with needle_server(is_dense=True) as server:
        assert accuracy(server, 4096) >= 0.95
        assert accuracy(server, 16384, num_questions=4) < 0.6
