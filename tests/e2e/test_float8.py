# SPDX-License-Identifier: Apache-2.0
"""Real servers on a CPU with float8 keys and values: the shipped checkpoint answers as it does without.

No dense backend is beside them: SGLang's for a CPU (`torch_native`) multiplies by no scale.
"""

from __future__ import annotations

import json
import statistics

import float8
import pytest
from traffic import answer_texts, counted

from sglang_tokenselect.demo_questions import draw_samples, token_counter
from sglang_tokenselect.needle import checkpoint_path, tasks
from sglang_tokenselect.needle_server import needle_server

CONFIG = json.loads((checkpoint_path() / "config.json").read_text())
COUNT_TOKENS = token_counter(checkpoint_path())
WINDOW = 64 + 448 + 128
ABSOLUTE = ("--tokenselect-positions", "absolute", "--tokenselect-min-len", "0", "--context-length", "4096")
SCALE = 0.25


def score(server, length: int) -> float:
    samples = draw_samples(length, 8, 101, COUNT_TOKENS)
    texts = answer_texts(server, [sample.prompt for sample in samples])
    return statistics.fmean(tasks.score(text, s.answers) for text, s in zip(texts, samples, strict=True))


@pytest.mark.parametrize(("positions", "length"), [("absolute", 4000), ("compact", 8192)])
def test_needles_are_found_in_float8(positions, length, tmp_path):
    """With scales in absolute positions, without in compact ones."""
    scaled = (*ABSOLUTE, *float8.scaled_flags(tmp_path, CONFIG["num_hidden_layers"], SCALE))
    with needle_server(False, *(scaled if positions == "absolute" else float8.FLAGS)) as server:
        found, counters = counted(server, lambda: score(server, length))
        log = server.log_path.read_text()
    print(f"{positions}: {found:.3f}")
    assert found >= 0.95
    assert counters["attended_tokens"] == WINDOW * counters["decode_queries"]
    assert counters["votes"] > 0 and counters["block_votes"] > 0
    assert ("Loaded KV cache scaling factors" in log) == (positions == "absolute")
    assert "An error occurred while reading" not in log, "the scales were not understood"
