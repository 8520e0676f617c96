# SPDX-License-Identifier: Apache-2.0
"""RULER's aggregation tasks: the most common words of a list, and the most frequent words of a coded text."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

from .sample import Sample
from .sizing import Request, fit
from .vocabulary import draw_letters, draw_words

COMMON_MAX_TOKENS = 120
NUM_COMMON = 10
SHORT = 4096
"""Lengths below have fewer repeats, and a smaller example."""
REPEATS, SHORT_REPEATS = (30, 3), (6, 1)
"""How often a common word stands in the list, and any other one."""
EXAMPLE, SHORT_EXAMPLE = (40, (10, 3)), (20, (3, 1))
"""Words of the solved example, and their repeats."""

FREQUENT_MAX_TOKENS = 50
NUM_FREQUENT = 3
CODE_LETTERS = 6
NOISE_WORD = "..."
ALPHA = 2.0
ZETA_OF_ALPHA = math.pi**2 / 6
LEAST_CODED = 100
"""With so many words or more, the first ranks differ in count: those of ranks 4 and 5 by 0.0137 of the words."""


def draw_common(request: Request) -> Sample:
    """The ten words that stand in a numbered list more often than the others."""
    rng = request.rng("words")
    repeats = REPEATS if request.length >= SHORT else SHORT_REPEATS
    num_example_words, example_repeats = EXAMPLE if request.length >= SHORT else SHORT_EXAMPLE
    known = draw_words(rng, NUM_COMMON + num_example_words)
    common, example = known[:NUM_COMMON], known[NUM_COMMON:]
    solved = _list_question(example[:NUM_COMMON], example[NUM_COMMON:], example_repeats, rng)
    solution = " ".join(f"{i}. {word}" for i, word in enumerate(example[:NUM_COMMON], 1))
    before = f"{solved.prompt}{solved.answer_prefix} {solution}\n"

    def build(num_others: int) -> Sample:
        others = draw_words(request.rng("others"), num_others, without=known)
        sample = _list_question(common, others, repeats, request.rng("order"))
        return Sample(before + sample.prompt, sample.answer_prefix, sample.answers, COMMON_MAX_TOKENS)

    return fit(build, 1, request)


def _list_question(
    common: Sequence[str], others: Sequence[str], repeats: tuple[int, int], rng: random.Random
) -> Sample:
    listed = [*common] * repeats[0] + [*others] * repeats[1]
    rng.shuffle(listed)
    context = " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))
    before = "The numbered list below repeats some words more often than the rest. Keep those words in mind.\n"
    question = f"\nQuestion: Which {len(common)} words stand in the list above most often?"
    prefix = f" Answer: The {len(common)} words that stand in the list most often are:"
    return Sample(before + context + question, prefix, tuple(common), COMMON_MAX_TOKENS)


def coded_counts(num_words: int) -> list[int]:
    """How often the word of each rank stands in a text of about so many words: a zeta distribution."""
    counts: list[int] = []
    while count := int(num_words * (len(counts) + 1) ** -ALPHA / ZETA_OF_ALPHA):
        counts.append(count)
    return counts


def draw_frequent(request: Request) -> Sample:
    """The three most frequent words of a coded text; the most frequent of all are the dots, which do not count."""

    def build(num_words: int) -> Sample:
        counts = coded_counts(num_words)
        vocabulary = [NOISE_WORD, *draw_letters(request.rng("words"), len(counts) - 1, CODE_LETTERS)]
        coded = [word for word, count in zip(vocabulary, counts, strict=True) for _ in range(count)]
        request.rng("order").shuffle(coded)
        before = "The coded text below repeats some coded words more often than others. Count each of them. "
        question = (
            "\nQuestion: Which three coded words stand in the text above most often? "
            f"Leave out the dots '{NOISE_WORD}' and explain nothing."
        )
        prefix = " Answer: The three coded words that stand in the text most often are:"
        answers = tuple(vocabulary[1 : 1 + NUM_FREQUENT])
        return Sample(before + " ".join(coded) + question, prefix, answers, FREQUENT_MAX_TOKENS)

    return fit(build, LEAST_CODED, request)
