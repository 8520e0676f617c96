# SPDX-License-Identifier: Apache-2.0
"""One question to a server, and what its answer must contain."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """A prompt and its answers. Texts are joined as they are: prompt + answer_prefix + what is generated."""

    prompt: str
    """Everything but the answer prefix."""
    answer_prefix: str
    """How the answer begins; given to completion APIs right after the prompt. "" if there is none."""
    answers: tuple[str, ...]
    max_tokens: int
    """Tokens to generate."""
    stop: tuple[str, ...] = ()
    """Stop strings."""
