# SPDX-License-Identifier: Apache-2.0
"""InfiniteBench's retrieval tasks: a pass key, a string of digits, the value of a key in a JSON object."""

from __future__ import annotations

import json

from .sample import Sample
from .sizing import Request, fit
from .vocabulary import NOISE_LINE, draw_distinct

PASSKEY_DIGITS = 5
# More than InfiniteBench's 6, 12 and 50: tokenizers with a token per digit need them, and answers may have an opening.
PASSKEY_MAX_TOKENS = 24
DIGITS_MAX_TOKENS = 32
VALUE_MAX_TOKENS = 64


def draw_passkey(request: Request) -> Sample:
    """Five digits."""
    key = "".join(request.rng("key").choices("0123456789", k=PASSKEY_DIGITS))
    return _draw_hidden(request, "pass key", key, PASSKEY_MAX_TOKENS)


def draw_number_string(request: Request) -> Sample:
    """Ten digits, of which five repeat the one before them, so that runs have to be copied exactly."""
    rng = request.rng("key")
    digits = rng.choices("0123456789", k=PASSKEY_DIGITS)
    while len(digits) < 2 * PASSKEY_DIGITS:
        place = rng.randrange(len(digits))
        digits.insert(place, digits[place])
    return _draw_hidden(request, "sequence of digits", "".join(digits), DIGITS_MAX_TOKENS)


def _draw_hidden(request: Request, noun: str, key: str, max_tokens: int) -> Sample:
    before = (
        "Something important is hidden in the irrelevant text below. Find it and keep it in mind, "
        "you will be asked for it.\n\n"
    )
    depth = request.drawn_depth()
    hidden = f"The {noun} is {key}. Keep it in mind. {key} is the {noun}."

    def build(num_lines: int) -> Sample:
        lines = [NOISE_LINE] * num_lines
        lines.insert(round(depth * num_lines), hidden)
        prompt = before + "\n".join(lines) + f"\n\nWhat is the {noun}?"
        return Sample(prompt, f"\n\nThe {noun} is", (key,), max_tokens)

    return fit(build, 1, request)


def draw_kv_retrieval(request: Request) -> Sample:
    """The UUID that a JSON object gives for another UUID."""
    depth = request.drawn_depth()
    key, value = draw_distinct(request.rng("key"), "uuids", 2)
    before = "Find the value of the given key in this JSON object.\n\nJSON data:\n"
    question = f'\n\nKey: "{key}"'

    def build(num_others: int) -> Sample:
        uuids = draw_distinct(request.rng("others"), "uuids", 2 * num_others)
        pairs = list(zip(uuids[::2], uuids[1::2], strict=True))
        pairs.insert(round(depth * num_others), (key, value))
        prompt = before + json.dumps(dict(pairs)) + question
        return Sample(prompt, "\nThe value of this key is:", (value,), VALUE_MAX_TOKENS)

    return fit(build, 1, request)
