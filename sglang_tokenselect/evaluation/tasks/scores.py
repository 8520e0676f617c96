# SPDX-License-Identifier: Apache-2.0
"""How predictions are scored, 0 to 1. The rules are those of RULER and InfiniteBench."""

from __future__ import annotations

import re
from collections.abc import Sequence

_SEPARATORS = str.maketrans(dict.fromkeys("\n:\"'.,?!{}", " "))


def contained(prediction: str, answers: Sequence[str]) -> float:
    """RULER's `string_match_all`: the share of answers that the prediction contains, whatever their case."""
    text = prediction.lower()
    return sum(answer.lower() in text for answer in answers) / len(answers)


def first_integer(prediction: str, answers: Sequence[str]) -> float:
    """InfiniteBench's rule for the pass key and the number string: the first run of digits is the answer."""
    found = re.search("[0-9]+", prediction)
    return float(found is not None and found.group() == answers[0])


def a_word(prediction: str, answers: Sequence[str]) -> float:
    """InfiniteBench's rule for key-value retrieval: the answer is one of the words, punctuation aside."""
    return float(answers[0] in prediction.translate(_SEPARATORS).split())
