# SPDX-License-Identifier: Apache-2.0
"""Writes a trace as one HTML file that needs nothing else.

The recordings travel as base64: for each step and layer the gaps between attended positions, 7 bits a byte,
then the weights as float16, little-endian. decode.js reads them.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from sglang_tokenselect.trace.pieces import Mark
from sglang_tokenselect.trace.steps import Row, Step

FOLDER = Path(__file__).parent
SCRIPTS = ("decode.js", "selection.js", "text.js", "map.js", "page.js")
"""One script in this order; the last one starts it."""


@dataclass(frozen=True)
class Trace:
    """One prompt, its answer, and what the answer's steps attended to.

    Attributes:
        title: what the page is called.
        texts: of the prompt's and the output's tokens (see pieces.token_texts).
        num_prompt_tokens: of these texts.
        sink: first positions that are always attended.
        local: last positions that are always attended.
        marks: what to mark, in the order of the text.
        steps: step i reads output token i and writes token i + 1.
    """

    title: str
    texts: Sequence[str]
    num_prompt_tokens: int
    sink: int
    local: int
    marks: Sequence[Mark]
    steps: Sequence[Step]


def render(trace: Trace) -> str:
    data, rows = _pack(trace.steps)
    facts = {
        "title": trace.title,
        "texts": list(trace.texts),
        "promptTokens": trace.num_prompt_tokens,
        "sink": trace.sink,
        "local": trace.local,
        "marks": [asdict(mark) for mark in trace.marks],
        "layers": list(trace.steps[0].layers),
        "steps": [
            {"seqLen": step.seq_len, "rows": step_rows} for step, step_rows in zip(trace.steps, rows, strict=True)
        ],
        "data": base64.b64encode(data).decode(),
    }
    parts = {
        "title": html.escape(trace.title),
        "style": _asset("page.css"),
        "facts": embedded_json(facts),
        "script": "".join(map(_asset, SCRIPTS)),
    }
    # Cut, not replaced one after the other: a text may look like a placeholder.
    before, *cuts = _asset("page.html").split("<!--%")
    filled = (parts[name] + after for name, _, after in (cut.partition("%-->") for cut in cuts))
    return before + "".join(filled)


def _asset(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def embedded_json(value: object) -> str:
    """JSON that no HTML parser takes for markup: `<` occurs in strings only, and there it may be escaped."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")


def _pack(steps: Sequence[Step]) -> tuple[bytes, list[list[list[int] | None]]]:
    """The bytes of all rows; and, per step and layer, a row's place in them and its tokens, None for everything."""
    packed = bytearray()
    places: list[list[list[int] | None]] = []
    for step in steps:
        places.append([])
        for row in step.rows:
            places[-1].append(None if row is None else [len(packed), len(row.positions)])
            packed += b"" if row is None else pack_row(row)
    return bytes(packed), places


def pack_row(row: Row) -> bytes:
    gaps = np.diff(row.positions, prepend=-1) - 1
    return pack_numbers(gaps) + row.weights.astype("<f2").tobytes()


def pack_numbers(numbers: np.ndarray) -> bytes:
    """Non-negative integers below 2^28: 7 bits a byte, lowest first, the high bit set but in the last byte."""
    shifts = np.arange(0, 28, 7)
    groups = numbers[:, None] >> shifts
    is_last = groups < 128
    is_kept = np.cumsum(is_last, axis=1) - is_last == 0
    groups = (groups & 127) | np.where(is_last, 0, 128)
    return groups[is_kept].astype(np.uint8).tobytes()
