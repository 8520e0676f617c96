# SPDX-License-Identifier: Apache-2.0
"""The text of each token, so that the texts join to what the tokens say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

INCOMPLETE = "\ufffd"
"""What decoders show for bytes that are no whole character."""
MOST_TOKENS = 8
"""Tokens that may share a character; more that end with INCOMPLETE are text that has it."""


@dataclass(frozen=True)
class Mark:
    """A text that the page marks: tokens `start` to `end - 1`."""

    label: str
    start: int
    end: int


def token_texts(ids: Sequence[int], decode: Callable[[Sequence[int]], str]) -> list[str]:
    """The text of each token. Of tokens that share a character the first has its text, the others "".

    A token is decoded after the one before it, since decoders drop the space before a first word.
    """
    texts: list[str] = []
    before, start = 0, 0  # tokens [before, start) are the cell before the one that begins at `start`
    for end in range(1, len(ids) + 1):
        known = decode(ids[before:start])
        text = decode(ids[before:end])[len(known) :]
        if text.endswith(INCOMPLETE) and end - start < MOST_TOKENS and end < len(ids):
            continue
        texts += [text] + [""] * (end - start - 1)
        before, start = start, end
    return texts


def find_marks(texts: Sequence[str], wanted: str) -> list[Mark]:
    """All places of a text, as the tokens that it touches."""
    starts, joined = [0], "".join(texts)
    for text in texts:
        starts.append(starts[-1] + len(text))
    marks, token = [], 0
    place = joined.find(wanted)
    while place >= 0:
        while starts[token + 1] <= place:
            token += 1
        end = token
        while starts[end] < place + len(wanted):
            end += 1
        while end < len(texts) and not texts[end]:  # the rest of a character's tokens
            end += 1
        marks.append(Mark(wanted.strip(), token, end))
        place = joined.find(wanted, place + len(wanted))
    return marks
