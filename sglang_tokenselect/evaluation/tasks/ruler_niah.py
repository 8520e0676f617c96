# SPDX-License-Identifier: Apache-2.0
"""RULER's needles in a haystack: numbers or UUIDs that a long text gives for keys."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from sglang_tokenselect.needle.tasks import place

from .sample import Sample
from .sizing import Request, fit
from .vocabulary import NOISE_LINE, Kind, draw_distinct, sentences

MAX_TOKENS = 128


@dataclass(frozen=True)
class Niah:
    """A variant of the task.

    Attributes:
        haystack: noise (one line, repeated), sentences (varied ones), or needles (of other keys).
        num_keys: keys in the haystack, beside those that it is made of; the first `num_asked` are asked for.
        num_values: values of each key.
    """

    haystack: Literal["noise", "sentences", "needles"]
    keys: Kind = "words"
    values: Literal["numbers", "uuids"] = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_asked: int = 1

    @property
    def has_depth(self) -> bool:
        return self.num_values * self.num_asked == 1

    @property
    def _noun(self) -> str:
        return self.values.removesuffix("s")

    def draw(self, request: Request) -> Sample:
        depth = request.drawn_depth() if self.has_depth else None
        rng = request.rng("needles")
        keys = draw_distinct(rng, self.keys, self.num_keys)
        values = draw_distinct(rng, self.values, self.num_keys * self.num_values)
        owners = [key for key in keys for _ in range(self.num_values)]
        needles = [self._needle(key, value) for key, value in zip(owners, values, strict=True)]
        before, question, prefix = self._texts(keys[: self.num_asked])
        answers = tuple(values[: self.num_asked * self.num_values])

        def build(num_pieces: int) -> Sample:
            pieces = self._pieces(request.rng("haystack"), num_pieces, keys, values)
            _insert(pieces, needles, request.rng("places"), depth)
            context = (" " if self.haystack == "sentences" else "\n").join(pieces)
            return Sample(before + context + question, prefix, answers, MAX_TOKENS)

        return fit(build, 1, request)

    def _pieces(self, rng: random.Random, count: int, keys: list[str], values: list[str]) -> list[str]:
        if self.haystack == "noise":
            return [NOISE_LINE] * count
        if self.haystack == "sentences":
            return list(islice(sentences(rng), count))
        others = draw_distinct(rng, self.keys, count, without=keys)
        return list(map(self._needle, others, draw_distinct(rng, self.values, count, without=values)))

    def _needle(self, key: str, value: str) -> str:
        return f"One special magic {self._noun} of {key} is: {value}."

    def _texts(self, asked: list[str]) -> tuple[str, str, str]:
        """What stands before the context, the question behind it, and how the answer begins."""
        noun, names = self._noun, _enumerate(asked)
        if self.has_depth:
            before = f"The text below hides a special magic {noun}. Keep it in mind, you will be asked for it.\n"
            question = f"\nWhich special magic {noun} does the text above give for {names}?"
            return before, question, f" The special magic {noun} that the text gives for {names} is"
        before = f"The text below hides special magic {noun}s. Keep them in mind, you will be asked for them.\n"
        question = f"\nWhich special magic {noun}s does the text above give for {names}? Name all of them."
        return before, question, f" All special magic {noun}s that the text gives for {names} are"


def _insert(pieces: list[str], needles: list[str], rng: random.Random, depth: float | None) -> None:
    """Puts the first needle at `depth`, or anywhere if None, and the others anywhere."""
    gaps = [gap for (gap,) in place(rng, [1] * len(needles), len(pieces), depth)]
    for gap, needle in sorted(zip(gaps, needles, strict=True), reverse=True):
        pieces.insert(gap, needle)


def _enumerate(names: list[str]) -> str:
    """`a`, or `a, b, and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])}, and {names[-1]}"
