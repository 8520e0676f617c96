# SPDX-License-Identifier: Apache-2.0
"""What the command asks: the texts of files, or needle questions within the shipped checkpoint's trained length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sglang_tokenselect.demo_questions import draw_samples, short_question, token_counter
from sglang_tokenselect.needle import checkpoint_path
from sglang_tokenselect.recording.options import read_prompt

NEEDLE_TOKENS = 4000
NEEDLE_QUESTIONS = 4


def read_prompts(paths: Sequence[Path]) -> dict[str, str]:
    """Texts by name; needle questions if no file is named."""
    if not paths:
        samples = draw_samples(NEEDLE_TOKENS, NEEDLE_QUESTIONS, 0, token_counter(checkpoint_path()))
        return {short_question(sample): sample.prompt for sample in samples}
    return {str(path): read_prompt(path, "--prompts") for path in paths}
