# SPDX-License-Identifier: Apache-2.0
"""What `trace` asks: a text of the user's, or a needle question for the shipped checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sglang_tokenselect.demo_questions import draw_samples, short_question, token_counter
from sglang_tokenselect.needle import tasks
from sglang_tokenselect.recording.options import read_prompt
from sglang_tokenselect.trace.options import DEFAULT_TOKENS

NEEDLE_LENGTH = 8192


@dataclass(frozen=True)
class Prompt:
    """What to ask.

    Attributes:
        title: in few words.
        text: sent as it is.
        num_tokens: of the answer, at most.
        marked: texts to mark in the page.
    """

    title: str
    text: str
    num_tokens: int
    marked: tuple[str, ...]


def from_file(file: Path, mark: str | None, num_tokens: int | None) -> Prompt:
    text = read_prompt(file, "--prompt")
    if mark is not None and (not mark or mark not in text):
        raise SystemExit(f"--mark: expected a text that is in the prompt, got {mark!r}")
    return Prompt(file.name, text, num_tokens or DEFAULT_TOKENS, () if mark is None else (mark,))


def needle_question(checkpoint: Path, num_tokens: int | None) -> Prompt:
    """A question about two needles, which are marked."""
    count_tokens = token_counter(checkpoint)
    *_, sample = draw_samples(NEEDLE_LENGTH, 3, seed=0, count_tokens=count_tokens)
    return Prompt(
        title=f"Asked for: {short_question(sample)}",
        text=sample.prompt,
        num_tokens=num_tokens or count_tokens(sample.completion),
        marked=needle_sentences(sample),
    )


def needle_sentences(sample: tasks.Sample) -> tuple[str, ...]:
    """The sentences that hide what the question asks for."""
    hidden = [sentence for group in sample.context.facts.statements() for sentence in group]
    return tuple(sentence for answer in sample.answers for sentence in hidden if answer in sentence)
