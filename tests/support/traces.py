# SPDX-License-Identifier: Apache-2.0
"""A small trace with what may break a page, and a decoder of pages that is not the page's own."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sglang_tokenselect.trace.page import Trace
from sglang_tokenselect.trace.pieces import Mark
from sglang_tokenselect.trace.steps import Row, Step

SINK, LOCAL, NUM_PROMPT_TOKENS = 4, 8, 300
MARK = Mark(label="<b>needle</b>: 42", start=100, end=106)
EMOJI = 127
"""The first of three tokens that share a character, where the page would end a paragraph: after 128 tokens."""
AWKWARD = {7: "</script>", 8: "<script>alert(1)</script>", 9: "<!--%script%-->", 12: "\n", 13: "\t&amp;", 20: "\u2028"}


def row(voted: dict[int, float], seq_len: int) -> Row:
    """Sink, local, and these positions with these weights."""
    weights = dict.fromkeys([*range(SINK), *range(seq_len - LOCAL, seq_len)], 0.01) | voted
    positions = sorted(weights)
    return Row(np.array(positions), np.array([weights[p] for p in positions], np.float16))


def small_trace() -> Trace:
    """300 tokens of prompt, 4 of answer, layers 0 and 2. The needle is attended in step 1, in layer 0 alone."""
    texts = [AWKWARD.get(i, f" w{i}") for i in range(NUM_PROMPT_TOKENS)] + [" the", "\n", "</title>", "é"]
    texts[EMOJI : EMOJI + 3] = ["🙂", "", ""]
    first, second, third = range(NUM_PROMPT_TOKENS + 1, NUM_PROMPT_TOKENS + 4)
    steps = [
        Step(first, (0, 2), (row({50: 0.25, 60: 0.5}, first), row({50: 0.75, 60: 0.125, 200: 2**-14}, first))),
        Step(second, (0, 2), (row({8: 0.125, EMOJI + 1: 0.25, 103: 0.9375}, second), row({210: 0.5}, second))),
        Step(third, (0, 2), (row({250: 0.5}, third), None)),
    ]
    return Trace("a </title> <b>", texts, NUM_PROMPT_TOKENS, SINK, LOCAL, [MARK], steps)


@dataclass(frozen=True)
class Page:
    """What a page holds: `facts` as render() embeds them; `rows` as {position: weight} per step and layer."""

    facts: dict
    rows: list[list[dict[int, float] | None]]


def read_page(path: Path) -> Page:
    [embedded] = re.findall(
        r'<script id="facts" type="application/json">(.*?)</script>', path.read_text(encoding="utf-8"), re.DOTALL
    )
    facts = json.loads(embedded)
    data = base64.b64decode(facts["data"])
    return Page(facts, [[read_row(data, place) for place in step["rows"]] for step in facts["steps"]])


def read_row(data: bytes, place: tuple[int, int] | None) -> dict[int, float] | None:
    if place is None:
        return None
    offset, num_tokens = place
    positions = []
    for _ in range(num_tokens):
        size = next(i for i in range(offset, offset + 4) if data[i] < 128) + 1 - offset
        gap = sum((byte & 127) << 7 * i for i, byte in enumerate(data[offset : offset + size]))
        positions.append((positions[-1] if positions else -1) + 1 + gap)
        offset += size
    return dict(zip(positions, np.frombuffer(data, "<f2", num_tokens, offset).tolist(), strict=True))
