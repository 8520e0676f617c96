# SPDX-License-Identifier: Apache-2.0
"""What a soak asks and when: questions about needles, seeded, in rounds that end with an idle server."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sglang_tokenselect.needle import tasks

Kind = Literal["answer", "abort", "leave", "bad"]
"""Asks and waits; is aborted by its rid; leaves the stream; asks for what must be refused."""

# What arrives together, and how often of 100 times.
ARRIVALS = {"one": 40, "fork": 15, "burst": 8, "abort": 15, "leave": 12, "bad": 10}
FORKS = (2, 5)
BURSTS = (3, 6)
# Seconds until an abort comes or a client leaves: while the request waits, in its prefill, and between its tokens.
PATIENCE = (0.02, 2.5)
# Budgets that requests ask for, beside the server's; smaller ones answer some of the questions wrongly.
BUDGETS = (320, 400)
LONGEST_DENSE = 4000  # tokens of context; beyond, dense attention leaves the trained length
BAD_OPTIONS: tuple[Any, ...] = (
    {"budget": -1},
    {"budget": 10**9},
    {"budget": True},
    {"budget": 64, "dense": True},
    {"dense": "yes"},
    {"what": 1},
    [1],
    "all",
)


@dataclass(frozen=True)
class Question:
    """A prompt, what a right answer holds, and where both are from.

    Attributes:
        num_tokens: of its context.
        options: of the request, as in request_options.py; hashable.
    """

    context: int
    number: int
    num_tokens: int
    prompt: str
    answers: tuple[str, ...]
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return f"context {self.context} of {self.num_tokens} tokens, question {self.number}, {dict(self.options)}"


@dataclass(frozen=True)
class Request:
    """One request of a round.

    Attributes:
        at: seconds since the round began.
        patience: seconds until an abort, or until the client leaves; 0 for others.
        bad: of kind "bad", the options.
    """

    at: float
    kind: Kind
    question: Question
    patience: float = 0.0
    bad: Any = None


def draw_contexts(
    count: int, longest: int, seed: int, count_tokens: Callable[[str], int]
) -> list[tuple[Question, ...]]:
    """Questions about each of `count` contexts of 200 to `longest` tokens, log-uniform.

    Four contexts each have one length: a selection or a slot that is another request's would then pass for one's own.
    """
    rng = random.Random(seed)
    sizes = [round(200 * (longest / 200) ** rng.random()) for _ in range(max(1, count // 4))]
    contexts = []
    for number in range(count):
        num_tokens = sizes[number % len(sizes)]
        context = tasks.make_context(
            tasks.held_out(1000 * seed + number), num_tokens, num_needles=4, count_tokens=count_tokens
        )
        samples = [*tasks.questions(context)[:3], tasks.ask_numbers(context, context.facts.needles[:2])]
        contexts.append(
            tuple(
                Question(number, index, num_tokens, sample.prompt, sample.answers)
                for index, sample in enumerate(samples)
            )
        )
    return contexts


def draw_round(
    rng: random.Random, contexts: Sequence[Sequence[Question]], seconds: float, rate: float
) -> list[Request]:
    """Requests of one round by their time: arrivals in an open loop, `rate` a second on average."""
    requests, at = [], rng.expovariate(rate)
    while at < seconds:
        [kind] = rng.choices(list(ARRIVALS), ARRIVALS.values())
        requests += _arrival(rng, contexts, kind, at)
        at += rng.expovariate(rate)
    return sorted(requests, key=lambda request: request.at)


def _arrival(rng: random.Random, contexts: Sequence[Sequence[Question]], kind: str, at: float) -> Iterator[Request]:
    questions = rng.choice(contexts)
    if kind == "one":
        yield Request(at, "answer", _question(rng, questions))
    elif kind == "fork":
        options = _options(rng, questions[0])
        for _ in range(rng.randint(*FORKS)):
            yield Request(at, "answer", _with(rng.choice(questions), options))
    elif kind == "burst":
        for _ in range(rng.randint(*BURSTS)):
            yield Request(at, "answer", _question(rng, rng.choice(contexts)))
    elif kind == "bad":
        yield Request(at, "bad", _question(rng, questions), bad=rng.choice(BAD_OPTIONS))
    else:
        patience = rng.uniform(*PATIENCE)
        yield Request(at, kind, _question(rng, questions), patience)
        if rng.random() < 0.5:  # somebody else at once, who may get the row and the slots
            yield Request(at + patience + 0.01, "answer", _question(rng, rng.choice(contexts)))


def _question(rng: random.Random, questions: Sequence[Question]) -> Question:
    question = rng.choice(questions)
    return _with(question, _options(rng, question))


def _options(rng: random.Random, question: Question) -> tuple[tuple[str, Any], ...]:
    """Seven of ten ask for nothing."""
    drawn = rng.random()
    if drawn < 0.7:
        return ()
    if drawn < 0.85 and question.num_tokens <= LONGEST_DENSE:
        return (("dense", True),)
    return (("budget", rng.choice(BUDGETS)),)


def _with(question: Question, options: tuple[tuple[str, Any], ...]) -> Question:
    return Question(question.context, question.number, question.num_tokens, question.prompt, question.answers, options)
