# SPDX-License-Identifier: Apache-2.0
"""What is to be drawn, and prompts that fill a length."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from .sample import Sample

SLACK = 200
"""A prompt may fall short of its length by one piece, or by one part in so many."""


@dataclass(frozen=True)
class Request:
    """Which sample to draw. All that is random comes from `rng`, so that a sample can be drawn again.

    Attributes:
        task: name of the task.
        length: tokens of prompt, answer prefix and answer together, at most.
        depth: where the fact asked for is to stand, 0 to 1; None if that is left to chance.
        is_trial: only to see if the length will do. The sample is drawn fast, and its length is none in particular.
    """

    task: str
    length: int
    seed: int
    index: int
    count_tokens: Callable[[str], int]
    depth: float | None = None
    is_trial: bool = False

    def rng(self, part: str) -> random.Random:
        """A fresh generator for a part of the sample; parts do not depend on each other's draws.

        Nor does it depend on the length: the same facts are asked for at every length.
        """
        return random.Random(f"{self.task} {self.seed} {self.index} {part}")

    def drawn_depth(self) -> float:
        return self.rng("depth").random() if self.depth is None else self.depth


def num_tokens(sample: Sample, count_tokens: Callable[[str], int]) -> int:
    """Prompt, answer prefix and the most that may be generated."""
    return count_tokens(sample.prompt + sample.answer_prefix) + sample.max_tokens


def fit(build: Callable[[int], Sample], least: int, request: Request) -> Sample:
    """The sample of about as many pieces as fit in `request.length` tokens, and never more than those.

    A secant search: it counts whole prompts, since the counts of pieces do not add up in every tokenizer, and about
    three of them, since counting takes most of the time.

    Args:
        build: the sample with so many pieces of filler; more pieces, more tokens, nearly in proportion.
        least: pieces that the sample needs.

    Raises:
        ValueError: not even `least` pieces fit, or a prompt has no room for so many that differ.
    """
    length, count_tokens = request.length, request.count_tokens
    low, fitting = least, build(least)
    low_size = num_tokens(fitting, count_tokens)
    if low_size > length:
        raise ValueError(f"length: expected at least {low_size} for {request.task}, got {length}")
    per_piece = (num_tokens(build(least + 32), count_tokens) - low_size) / 32
    high = None  # So many pieces are too many.
    if request.is_trial:  # A first guess at the pieces, uncounted.
        return build(low + max(int((length - low_size) / per_piece), 0))
    while length - low_size > max(per_piece, length // SLACK) and high != low + 1:
        pieces = low + max(int((length - low_size) / per_piece), 1)
        if high is not None:
            pieces = min(pieces, high - 1)
        sample = build(pieces)
        size = num_tokens(sample, count_tokens)
        if size > low_size:  # Where pieces are random, more of them may be shorter.
            per_piece = (size - low_size) / (pieces - low)
        if size <= length:
            low, low_size, fitting = pieces, size, sample
        else:
            high = pieces
    return fitting
