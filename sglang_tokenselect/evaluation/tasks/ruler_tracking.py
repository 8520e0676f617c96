# SPDX-License-Identifier: Apache-2.0
"""RULER's variable tracking: a chain of assignments hidden in noise."""

from __future__ import annotations

import random
import string
from dataclasses import replace

from sglang_tokenselect.needle.tasks import place

from .sample import Sample
from .sizing import Request, fit
from .vocabulary import NOISE_LINE, draw_letters

MAX_TOKENS = 30
HOPS = 4
VALUES = range(10_000, 100_000)
NAME_LETTERS = 5
EXAMPLE_TOKENS = 500
EXAMPLE_NAME_LETTERS = 3


def draw(request: Request) -> Sample:
    """All variables of the chain, in any order. A solved example stands before, as in RULER."""
    rng = request.rng("chain")
    value, example_value = map(str, rng.sample(VALUES, 2))
    names = draw_letters(rng, HOPS + 1, NAME_LETTERS, string.ascii_uppercase)
    example_names = draw_letters(rng, HOPS + 1, EXAMPLE_NAME_LETTERS, string.ascii_uppercase)

    def build_example(num_lines: int) -> Sample:
        return _question(example_value, example_names, num_lines, request.rng("places of the example"), 0)

    example = fit(build_example, 1, replace(request, length=EXAMPLE_TOKENS))
    solved = f"{example.prompt}{example.answer_prefix} {' '.join(example_names)}\n\n"

    def build(num_lines: int) -> Sample:
        sample = _question(value, names, num_lines, request.rng("places"), MAX_TOKENS)
        return Sample(solved + sample.prompt, sample.answer_prefix, sample.answers, MAX_TOKENS)

    return fit(build, 1, request)


def _question(value: str, names: list[str], num_lines: int, rng: random.Random, max_tokens: int) -> Sample:
    steps = [f"VAR {names[0]} = {value}", *(f"VAR {b} = VAR {a}" for a, b in zip(names, names[1:], strict=False))]
    lines = [NOISE_LINE] * num_lines
    (gaps,) = place(rng, [len(steps)], num_lines)
    # From the back, so that earlier gaps stay where they are and steps at one gap keep their order.
    for gap, step in zip(reversed(gaps), reversed(steps), strict=True):
        lines.insert(gap, step)
    before = "Follow the variable assignments that are hidden in the text below.\n\n"
    question = f"\nQuestion: Which variables hold the value {value} in the text above? Name all of them."
    prefix = f" Answer: By the assignments in the text above, {len(names)} variables hold the value {value}:"
    return Sample(before + "\n".join(lines) + question, prefix, tuple(names), max_tokens)
