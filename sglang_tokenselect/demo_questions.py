# SPDX-License-Identifier: Apache-2.0
"""What the demo asks: contexts of given lengths, and a few questions about each."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path

from sglang_tokenselect.needle import tasks
from sglang_tokenselect.needle_server import CONTEXT_LENGTH

LENGTHS = range(1024, CONTEXT_LENGTH - 1023)
QUESTIONS = range(1, 13)
SEEDS = range(1 << 16)
# Of a length, kept for the question and the answer, so that a prompt of the trained length is one.
ROOM_TO_ANSWER = 80

KINDS = ("one number", "one number", "two numbers", "variables")
"""Questions about a context, in this order and again from the start."""


def token_counter(checkpoint: Path) -> Callable[[str], int]:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
    return lambda text: len(tokenizer.encode(text).ids)


def draw_samples(length: int, num_questions: int, seed: int, count_tokens: Callable[[str], int]) -> list[tasks.Sample]:
    """Questions that share one context; with any of them the context takes about `length` tokens."""
    kinds = list(islice(cycle(KINDS), num_questions))
    context = tasks.make_context(
        tasks.held_out(seed * LENGTHS.stop + length),
        length - ROOM_TO_ANSWER,
        count_tokens=count_tokens,
        num_needles=max(8, 2 * num_questions),
        num_chains=max(1, kinds.count("variables")),
        hops=2,
    )
    needles, chains = iter(context.facts.needles), iter(context.facts.chains)
    ask = {
        "one number": lambda: tasks.ask_number(context, next(needles)),
        "two numbers": lambda: tasks.ask_numbers(context, [next(needles), next(needles)]),
        "variables": lambda: tasks.ask_variables(context, next(chains)),
    }
    return [ask[kind]() for kind in kinds]


def short_question(sample: tasks.Sample) -> str:
    """In few words, for a table: `number of amber`, `numbers of amber, cedar` or `variables = 123456`."""
    facts, answers = sample.context.facts, set(sample.answers)
    if sample.task == "variable_tracking":
        value = next(chain.value for chain in facts.chains if answers == set(chain.names))
        return f"variables = {value}"
    keys = [needle.key for needle in facts.needles if answers & set(needle.values)]
    return f"number{'s' if len(answers) > 1 else ''} of {', '.join(keys)}"
