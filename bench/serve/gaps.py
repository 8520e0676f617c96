# SPDX-License-Identifier: Apache-2.0
"""From arrivals to times between tokens: only while all requests of a cell decode, or of all requests."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from bench.serve.client import Answer

MIN_STEPS = 32
# Chunks with several tokens: a busy HTTP server sends late ones together.
MAX_MERGED = 0.05


@dataclass(frozen=True)
class Gaps:
    """Times between consecutive tokens.

    Attributes:
        seconds: of all requests. A chunk of n tokens counts as n equal gaps.
        chunks: that ended these gaps.
        merged: chunks among them with more than one token.
    """

    seconds: tuple[float, ...]
    chunks: int
    merged: int


def common_gaps(answers: Sequence[Answer], max_merged: float = MAX_MERGED) -> Gaps:
    """Gaps from the last request's first token to the first request's last token.

    Raises:
        ValueError: fewer than MIN_STEPS steps are common to all, or more than `max_merged` of the chunks are merged.
    """
    begin = max(answer.arrivals[0] for answer in answers)
    end = min(answer.arrivals[-1] for answer in answers)
    per_answer = [_gaps_within(answer, begin, end) for answer in answers]
    steps = min(sum(tokens for _, tokens in gaps) for gaps in per_answer)
    if steps < MIN_STEPS:
        raise ValueError(f"{steps} steps common to all requests, expected at least {MIN_STEPS}")
    found = _joined(per_answer)
    if found.merged > max_merged * found.chunks:
        mean = statistics.mean(found.seconds) * 1e3
        raise ValueError(
            f"{found.merged} of {found.chunks} chunks carry more than one token, {mean:.3f} ms a token in the mean"
        )
    return found


def all_gaps(answers: Sequence[Answer]) -> Gaps:
    """Gaps of whole answers, those in which others were prefilled included."""
    return _joined([_gaps_within(answer, -math.inf, math.inf) for answer in answers])


def _joined(per_answer: Sequence[Sequence[tuple[float, int]]]) -> Gaps:
    gaps = [gap for gaps in per_answer for gap in gaps]
    return Gaps(
        seconds=tuple(seconds / tokens for seconds, tokens in gaps for _ in range(tokens)),
        chunks=len(gaps),
        merged=sum(tokens > 1 for _, tokens in gaps),
    )


def _gaps_within(answer: Answer, begin: float, end: float) -> list[tuple[float, int]]:
    """(seconds, tokens) between consecutive chunks that arrived within [begin, end]."""
    chunks = [
        (arrival, tokens)
        for arrival, tokens in zip(answer.arrivals, answer.tokens, strict=True)
        if begin <= arrival <= end
    ]
    return [(later - earlier, after - before) for (earlier, before), (later, after) in pairwise(chunks)]
