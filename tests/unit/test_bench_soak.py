# SPDX-License-Identifier: Apache-2.0
"""The soak's own judgement: what it asks is seeded, what differs is seen, growth is a difference of medians."""

from __future__ import annotations

import random

import pytest

from bench.soak import checks, memory, traffic
from bench.soak.clients import Outcome, is_same
from bench.soak.traffic import Question, Request

CONTEXTS = traffic.draw_contexts(8, 1500, 3, lambda text: len(text.split()))


def test_rounds_are_seeded_and_have_everything():
    rounds = [traffic.draw_round(random.Random(7), CONTEXTS, 200.0, 2.0) for _ in range(2)]
    assert rounds[0] == rounds[1]
    assert {request.kind for request in rounds[0]} == {"answer", "abort", "leave", "bad"}
    assert [request.at for request in rounds[0]] == sorted(request.at for request in rounds[0])
    assert {request.question.options for request in rounds[0]} >= {(), (("dense", True),)}


def test_contexts_come_in_fours_of_one_length():
    assert {
        sum(questions[0].num_tokens == n for questions in CONTEXTS) for n in {q[0].num_tokens for q in CONTEXTS}
    } == {4}
    assert len({questions[0].prompt for questions in CONTEXTS}) == len(CONTEXTS)


@pytest.mark.parametrize(
    ("text", "finished", "expected"),
    [
        (" a: 12", True, True),
        (" a: 13", True, False),
        (" a:", True, False),
        (" a:", False, True),
        ("", False, True),
        (" b", False, False),
        (" a: 12. And so on", False, True),
        (" a: 1. And so on", False, False),
        (" a: 12\nmore", True, True),
    ],
)
def test_sameness(text, finished, expected):
    assert is_same(text, " a: 12", finished) is expected


def test_an_answer_that_differs_is_told():
    question = Question(1, 2, 300, "prompt", ("12",))
    alone = checks.Alone({question: " a: 12"}, 1)
    request = Request(0.0, "answer", question)
    outcomes = [Outcome(request, " a: 12"), Outcome(request, " a: 34"), Outcome(request, " a: 56", retractions=1)]
    assert checks.mismatches(outcomes[:1], alone) == []
    first, second = checks.mismatches(outcomes, alone)
    assert "34" in first and "context 1 of 300 tokens, question 2" in first
    assert "56" in second and "after 1 retractions" in second


def test_faults_of_a_log():
    log = "all well\n[x] pool memory leak detected! [full]\n#retracted_reqs: 2, more\nx\n#retracted_reqs: 3\n"
    assert checks.log_faults(log) == ["[x] pool memory leak detected! [full]"]
    assert checks.count_retracted(log) == 5


def test_growth():
    samples = [memory.Sample(t, {"http": t * 10, "gone": 1} if t else {"http": 0}, 0, t) for t in range(8)]
    assert memory.growth(samples, lambda sample: sample.rss["http"]) == (5, 65)
    assert memory.process_names(samples) == ["http"]
    assert checks.lent_faults(samples, 7) == []
    assert checks.lent_faults(samples, 6) == ["lent_entries: expected at most 6, got 7"]
