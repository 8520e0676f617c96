# SPDX-License-Identifier: Apache-2.0
"""The tasks that the package's own checkpoint was trained on, on seeds that training has not seen.

Samples of one length and seed share contexts, so that a server with a prefix cache reads each context once: one
context has questions of four of the five tasks. A context in which the number asked for stands at a given depth
belongs to one sample.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from functools import lru_cache

from sglang_tokenselect.needle import tasks

from .sample import Sample
from .sizing import Request

MAX_TOKENS = 64
STOP = ("\n", ".")
KEYS_PER_QUESTION = 4
_ANSWER = "\nAnswer:"


@dataclass(frozen=True)
class Layout:
    """What a context hides: values of each key, names of each chain."""

    values_per_key: tuple[int, ...]
    names_per_chain: tuple[int, ...] = ()


ONE_NEEDLE = Layout((1,))
MANY = Layout((1,) * 16 + (4,) * 2, (4,) * 2)


@dataclass(frozen=True)
class NeedleTask:
    """A kind of question, and how many of it each context has."""

    kind: tasks.Task
    layout: Layout
    num_questions: int

    def draw(self, request: Request) -> Sample:
        group, place = divmod(request.index, self.num_questions)
        first = 0 if request.depth is None else place
        context = _context(self.layout, replace(request, task="", index=group), first)
        asked = [question for question in _questions(context) if question.task == self.kind][place - first]
        question, prefix = asked.question.split(_ANSWER)
        return Sample(context.text + question, _ANSWER + prefix, asked.answers, MAX_TOKENS, STOP)


@lru_cache(maxsize=4)
def _context(layout: Layout, request: Request, first: int) -> tasks.Context:
    """A context that leaves room for each of its questions. The needle of index `first` stands at the depth.

    Args:
        request: of all tasks and samples that share the context: without a task, and its index is the context's.
    """
    length, count_tokens = request.length, request.count_tokens
    held_out = tasks.held_out(random.Random(f"{layout} {request.seed} {request.index}").getrandbits(40))
    facts = tasks.draw_facts(
        random.Random(held_out), values_per_key=layout.values_per_key, names_per_chain=layout.names_per_chain
    )
    facts = replace(facts, needles=facts.needles[first:] + facts.needles[:first])
    longest = max((asked.question for asked in _questions(tasks.Context("", facts))), key=count_tokens)
    room = length - MAX_TOKENS - count_tokens(longest)
    hidden = [facts.header(), *(sentence for statement in facts.statements() for sentence in statement)]
    if (missing := sum(map(count_tokens, hidden)) - room) > 0:
        raise ValueError(f"length: expected at least {length + missing} for the needle suite, got {length}")
    if request.is_trial:
        room += missing  # for what is hidden alone
    haystack: tasks.Haystack = "noise" if request.seed % 2 else "sentences"
    excess = 0
    while True:
        room -= excess
        context = tasks.make_context(
            held_out, room, count_tokens=count_tokens, haystack=haystack, depth=request.depth, facts=facts
        )
        # Not every tokenizer's counts of pieces add up to that of the whole.
        excess = count_tokens(context.text + longest) + MAX_TOKENS - length
        if excess <= 0:
            return context


def _questions(context: tasks.Context) -> list[tasks.Sample]:
    """All questions about a context, of every kind."""
    needles = context.facts.needles
    single, step = [needle for needle in needles if len(needle.values) == 1], KEYS_PER_QUESTION
    return [
        *(tasks.ask_number(context, needle) for needle in needles),
        *(tasks.ask_numbers(context, single[i : i + step]) for i in range(0, len(single) - step + 1, step)),
        *(tasks.ask_variables(context, chain) for chain in context.facts.chains),
    ]
