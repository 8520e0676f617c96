# SPDX-License-Identifier: Apache-2.0
"""Tensor parallel over two GPUs: the shipped checkpoint's greedy tokens are those of one GPU."""

from __future__ import annotations

import pytest
import torch
from accelerator import NEEDS_CUDA
from traffic import AT_ONCE, answer_alone, answer_at_once, answer_texts, counted, fork

from bench.needle.serve import samples_of
from sglang_tokenselect.demo_questions import token_counter
from sglang_tokenselect.needle import checkpoint_path, tasks
from sglang_tokenselect.needle_server import needle_server

pytestmark = [
    NEEDS_CUDA,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

COUNT_TOKENS = token_counter(checkpoint_path())
SAMPLES = [sample for seed in range(3) for sample in samples_of(8192, seed, COUNT_TOKENS)]
BRANCHES = fork(16_000, 1, COUNT_TOKENS)
TP = ("--tp", "2")
EAGER = ("--disable-cuda-graph",)


def ask_samples(server):
    """The numbers of one name are equally near to the question, so rounding decides which comes first."""
    return [sorted(answer_texts(server, [sample.prompt])[0].strip().split(", ")) for sample in SAMPLES]


def mean_score(answers):
    scores = [tasks.score(", ".join(answer), sample.answers) for answer, sample in zip(answers, SAMPLES, strict=True)]
    return sum(scores) / len(scores)


@pytest.fixture(scope="module")
def alone():
    """On one GPU."""
    with needle_server(False, *AT_ONCE, device="cuda") as server:
        yield counted(server, lambda: ask_samples(server))


@pytest.mark.parametrize("flags", [(), EAGER], ids=["graphs", "eager"])
def test_the_tokens_of_one_gpu(alone, flags):
    """With votes, reuse, and blocks of prefill; and questions that are scored together."""
    expected, counters_alone = alone
    with needle_server(False, *AT_ONCE, *TP, *flags, device="cuda") as server:
        answers, counters = counted(server, lambda: ask_samples(server))
        one_by_one, _ = counted(server, lambda: answer_alone(server, BRANCHES))
        at_once, counters_at_once = counted(server, lambda: answer_at_once(server, BRANCHES))
    print(f"score {mean_score(answers):.3f}, on one GPU {mean_score(expected):.3f}; {counters}, {counters_alone}")
    assert answers == expected
    assert mean_score(answers) >= 0.95
    assert counters["block_votes"] == counters_alone["block_votes"] > 0
    assert counters["votes"] > 0 and counters["reuses"] > 0
    assert all(branch.answer in answer for branch, answer in zip(BRANCHES, one_by_one, strict=True))
    assert at_once == one_by_one and counters_at_once["shared_queries"] > 0


def test_ranks_that_choose_alone():
    """Each has half of the heads: fewer votes for the same budget, and another answer now and then."""
    with needle_server(False, *AT_ONCE, *TP, "--tokenselect-vote", "local", device="cuda") as server:
        answers, counters = counted(server, lambda: ask_samples(server))
    print(f"local: score {mean_score(answers):.3f}")
    assert mean_score(answers) >= 0.8
    assert counters["votes"] > 0 and counters["block_votes"] > 0
