# SPDX-License-Identifier: Apache-2.0
"""The needle checkpoint answers in plain PyTorch through the runner that serves it."""

from __future__ import annotations

import statistics

import pytest

from bench.needle.evaluate import Evaluator, Job, parse_policy
from sglang_tokenselect.needle import checkpoint_path


@pytest.fixture(scope="module")
def evaluator() -> Evaluator:
    return Evaluator(checkpoint_path(), "cpu")


def mean_score(evaluator: Evaluator, policy: str) -> float:
    rows = evaluator.run(Job(tokens=2048, policy=parse_policy(policy), seed=0, questions=1))
    return statistics.mean(row["score"] for row in rows)


@pytest.mark.parametrize("policy", ["dense", "64+448+128", "64+448+128/64/8"])
def test_it_answers_all(evaluator, policy):
    assert mean_score(evaluator, policy) == 1.0


def test_it_does_not_when_none_are_chosen(evaluator):
    assert mean_score(evaluator, "window") < 0.5
