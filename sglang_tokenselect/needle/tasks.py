# SPDX-License-Identifier: Apache-2.0
"""Needle tasks in the terms of RULER (arXiv 2404.06654): contexts, questions, scores.

A context hides *needles* (a key and its number) and *chains* (variables that hold one number) among
filler sentences. Questions stand after the context and the context does not depend on them, so that
many questions share one prefix.

Values are six-digit numbers, two tokens of three digits, and no two groups of three digits in a
context are equal. That is easier than RULER's free numbers: a small model copies the second group
after the first without a doubt. A key is followed by a colon and its value, in needles and in
answers, and the prompt ends before the key: the answer repeats it and then looks up the value.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from . import words

Task = Literal["single", "multi_key", "multi_value", "multi_query", "variable_tracking"]
Haystack = Literal["noise", "sentences"]

TASKS: tuple[Task, ...] = ("single", "multi_key", "multi_value", "multi_query", "variable_tracking")
HELD_OUT_SEED = 1 << 40
"""Seeds from here on are for evaluation; training takes those below."""


@dataclass(frozen=True)
class Needle:
    """A key and the numbers that the context gives for it."""

    key: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Chain:
    """Variables that hold one value, each assigned from the one before it."""

    value: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    """What a context hides."""

    needles: tuple[Needle, ...]
    chains: tuple[Chain, ...]
    noun: str = words.NOUNS[0]

    def header(self) -> str:
        noun = self.noun
        return (
            f"Some {noun}s are hidden within the following text. Make sure to memorize it. "
            f"I will quiz you about the {noun}s afterwards.\n"
        )

    def statements(self) -> list[list[str]]:
        """Sentences to hide. Those of one inner list stand in that order in the context."""
        hidden = [
            [f" One of the {self.noun}s for {needle.key}: {value}."]
            for needle in self.needles
            for value in needle.values
        ]
        for chain in self.chains:
            first, *rest = chain.names
            steps = zip(chain.names, rest, strict=False)
            hidden.append([f" VAR {first} = {chain.value}."] + [f" VAR {b} = VAR {a}." for a, b in steps])
        return hidden


@dataclass(frozen=True)
class Context:
    """A text and what it hides."""

    text: str
    facts: Facts


@dataclass(frozen=True)
class Sample:
    """One question about a context, and what a full answer contains."""

    context: Context
    question: str
    answers: tuple[str, ...]
    completion: str
    task: Task

    @property
    def prompt(self) -> str:
        return self.context.text + self.question


def held_out(index: int) -> int:
    """The evaluation seed of this index; no training run has drawn it."""
    if not 0 <= index < HELD_OUT_SEED:
        raise ValueError(f"index: expected 0 <= index < {HELD_OUT_SEED}, got {index}")
    return HELD_OUT_SEED + index


def draw_facts(
    rng: random.Random, *, values_per_key: Sequence[int], names_per_chain: Sequence[int], noun: str = words.NOUNS[0]
) -> Facts:
    """Facts with one needle per entry of ``values_per_key`` and one chain per entry of ``names_per_chain``."""
    numbers = _draw_numbers(rng, sum(values_per_key) + len(names_per_chain))
    keys = iter(rng.sample(words.KEYS, len(values_per_key)))
    names = iter(rng.sample(words.NAMES, sum(names_per_chain)))
    return Facts(
        needles=tuple(Needle(next(keys), tuple(next(numbers) for _ in range(n))) for n in values_per_key),
        chains=tuple(Chain(next(numbers), tuple(next(names) for _ in range(n))) for n in names_per_chain),
        noun=noun,
    )


def _draw_numbers(rng: random.Random, count: int) -> Iterator[str]:
    """Six-digit numbers made of distinct groups of three digits, none with a leading zero."""
    groups = rng.sample(range(100, 1000), 2 * count)
    return (f"{a}{b}" for a, b in zip(groups[::2], groups[1::2], strict=True))


def make_context(
    seed: int,
    num_tokens: int,
    *,
    count_tokens: Callable[[str], int],
    num_needles: int = 8,
    values_per_key: int = 1,
    num_chains: int = 0,
    hops: int = 3,
    haystack: Haystack = "sentences",
    depth: float | None = None,
    facts: Facts | None = None,
) -> Context:
    """A context of at most ``num_tokens`` tokens, short of it by less than one sentence.

    Args:
        count_tokens: tokens of a piece of text; pieces are sentences with their leading space.
        num_needles: needle sentences; ``num_needles // values_per_key`` keys.
        num_chains: chains of ``hops + 1`` variables, besides the needles.
        depth: place of the first needle, 0 (start) to 1 (end); uniform if None, as all others are.
        facts: what to hide, instead of facts drawn by the four sizes above.
    """
    if num_needles % values_per_key:
        raise ValueError(f"num_needles: expected a multiple of values_per_key={values_per_key}, got {num_needles}")
    rng = random.Random(seed)
    facts = facts or draw_facts(
        rng,
        values_per_key=[values_per_key] * (num_needles // values_per_key),
        names_per_chain=[hops + 1] * num_chains,
    )
    hidden = facts.statements()
    fixed = [facts.header(), *(sentence for group in hidden for sentence in group)]
    room = num_tokens - sum(map(count_tokens, fixed))
    if room < 0:
        raise ValueError(f"num_tokens: expected at least {num_tokens - room} for these facts, got {num_tokens}")
    filler = list(_fill(_sentences(rng, haystack), room, count_tokens))
    places = place(rng, [len(group) for group in hidden], len(filler), depth)
    return Context(facts.header() + "".join(_interleave(hidden, places, filler)), facts)


def place(rng: random.Random, sizes: Iterable[int], num_gaps: int, depth: float | None = None) -> list[list[int]]:
    """For each group of statements, the filler sentence that each stands before, ascending in a group."""
    places = [sorted(rng.randint(0, num_gaps) for _ in range(size)) for size in sizes]
    if depth is not None and places:
        places[0][0] = round(depth * num_gaps)
    return places


def _interleave(hidden: list[list[str]], places: list[list[int]], filler: list[str]) -> Iterator[str]:
    before: dict[int, list[str]] = {}
    for group, gaps in zip(hidden, places, strict=True):
        for sentence, gap in zip(group, gaps, strict=True):
            before.setdefault(gap, []).append(sentence)
    for gap in range(len(filler) + 1):
        yield from before.get(gap, ())
        yield from filler[gap : gap + 1]


def _fill(sentences: Iterator[str], room: int, count_tokens: Callable[[str], int]) -> Iterator[str]:
    for sentence in sentences:
        room -= count_tokens(sentence)
        if room < 0:
            return
        yield sentence


def _sentences(rng: random.Random, haystack: Haystack) -> Iterator[str]:
    """Endless filler sentences, each with its leading space."""
    if haystack not in ("noise", "sentences"):
        raise ValueError(f"haystack: expected 'noise' or 'sentences', got {haystack!r}")
    while True:
        if haystack == "noise":
            yield from words.NOISE
        else:
            yield template_sentence(rng)


def template_sentence(rng: random.Random) -> str:
    """A sentence of the template grammar, with its leading space; it names no key and no number."""
    pick = rng.choice
    act = f"{pick(words.HOW)} {pick(words.WHO)} {pick(words.DID)} a {pick(words.WHICH)} {pick(words.WHAT)}"
    place_ = f"{pick(words.NEAR)} the {pick(words.WHERE)}"
    return pick(
        (
            f" The {act} {place_}.",
            f" {pick(words.WHEN)} the {act}.",
            f" {pick(words.WHEN)} the {act} {place_}.",
            f" The {pick(words.WHO)} waited {place_} while the {pick(words.WHO)} sang.",
            f" Nobody knew why the {act}.",
        )
    )


def ask_number(context: Context, needle: Needle) -> Sample:
    """The one number of a key, or all numbers of a key, in any order."""
    if len(needle.values) > 1:
        return _ask(context, f"What are all the {context.facts.noun}s", [needle], "multi_value")
    task: Task = "single" if len(context.facts.needles) == 1 else "multi_key"
    return _ask(context, f"What is the {context.facts.noun}", [needle], task)


def ask_numbers(context: Context, needles: Sequence[Needle]) -> Sample:
    """The numbers of several keys."""
    return _ask(context, f"What are the {context.facts.noun}s", needles, "multi_query")


def _ask(context: Context, asked: str, needles: Sequence[Needle], task: Task) -> Sample:
    """The answer repeats the key before each number."""
    keys = ", ".join(needle.key for needle in needles)
    question = f"\n{asked} for {keys} mentioned in the provided text?\nAnswer: The {context.facts.noun} for"
    pairs = [(needle.key, value) for needle in needles for value in needle.values]
    completion = f" {', '.join(f'{key}: {value}' for key, value in pairs)}."
    return Sample(context, question, tuple(value for _, value in pairs), completion, task)


def ask_variables(context: Context, chain: Chain) -> Sample:
    """All variables of a chain, in its order. The answer repeats the value before them."""
    question = (
        f"\nWhich variables are assigned the value {chain.value} in the provided text?\n"
        "Answer: The variables assigned the value"
    )
    completion = f" {chain.value} are {', '.join(chain.names)}."
    return Sample(context, question, chain.names, completion, "variable_tracking")


def questions(context: Context, *, keys_per_question: int = 1) -> list[Sample]:
    """One question per fact; with ``keys_per_question`` > 1, needles are asked that many at a time."""
    needles, step = context.facts.needles, keys_per_question
    if step == 1:
        asked = [ask_number(context, needle) for needle in needles]
    else:
        asked = [ask_numbers(context, needles[i : i + step]) for i in range(0, len(needles) - step + 1, step)]
    return asked + [ask_variables(context, chain) for chain in context.facts.chains]


def score(prediction: str, answers: Sequence[str]) -> float:
    """RULER's ``string_match_all``: the fraction of expected strings that the prediction contains."""
    return sum(answer in prediction for answer in answers) / len(answers)
