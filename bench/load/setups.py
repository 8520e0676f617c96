# SPDX-License-Identifier: Apache-2.0
"""What is measured: the model, the requests and the servers, on an H200 and, as a test of the scripts, on the CPU."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from bench.serve import cells
from bench.serve.cells import DENSE, FLAGS, MODEL

TOKENSELECT = "tokenselect"
FIXED, LOAD, SLO = "fixed", "load", "slo"
SERVERS = (DENSE, FIXED, LOAD, SLO)

MIN_REQUESTS = 4  # of a cell, however low its rate
RANGE_RATIO = 0.5  # shortest prompt by longest, and shortest answer by longest: the client has one flag for both


@dataclass(frozen=True)
class ServedModel:
    """A model and how it is served.

    Attributes:
        flags: of every server.
        dense_backend: of the dense server.
        sparse_flags: of the servers with TokenSelect.
    """

    described: str
    model: dict[str, object]
    flags: tuple[str, ...]
    dense_backend: str
    sparse_flags: tuple[str, ...]


@dataclass(frozen=True)
class Setup(ServedModel):
    """A model and requests for it.

    Attributes:
        prompt_tokens, output_tokens: of the longest prompt and answer.
        burst: requests of the longest prompt that come at once to warm a server up.
        rates: requests per second.
        duration: seconds in which the requests of a cell arrive, on average.
    """

    prompt_tokens: int
    output_tokens: int
    burst: int
    rates: tuple[float, ...]
    duration: float

    @property
    def shortest_prompt(self) -> int:
        return int(RANGE_RATIO * self.prompt_tokens)

    def num_requests(self, rate: float) -> int:
        return max(round(rate * self.duration), MIN_REQUESTS)


H200 = Setup(
    described="Llama-3-8B shape, bfloat16, random weights",
    model=MODEL,
    # The client times chunks of text. A CUDA graph holds 32 requests, and more of such prompts do not fit in memory.
    flags=(*(flag for flag in FLAGS if flag != "--skip-tokenizer-init"), "--max-running-requests", "32"),
    dense_backend="flashinfer",
    sparse_flags=(),
    prompt_tokens=32768,
    output_tokens=512,
    burst=8,
    rates=(0.2, 0.6, 0.9, 1.2),
    duration=30.0,
)
QUICK = replace(H200, rates=(0.6, 1.2), duration=10.0)
SMOKE = Setup(
    described="a tiny Llama on the CPU, random weights: these numbers say nothing about speed",
    model={
        **MODEL,
        **{"hidden_size": 256, "intermediate_size": 192, "num_hidden_layers": 2, "torch_dtype": "float32"},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 4096},
    },
    flags=(
        *("--device", "cpu", "--dtype", "float32", "--load-format", "dummy", "--grammar-backend", "none"),
        *("--max-total-tokens", "40000", "--random-seed", "0", "--stream-interval", "1"),
    ),
    dense_backend="torch_native",
    sparse_flags=(
        *("--tokenselect-sink", "16", "--tokenselect-budget", "48", "--tokenselect-local", "32"),
        *("--tokenselect-block", "32", "--tokenselect-sub-block", "8", "--tokenselect-min-len", "0"),
    ),
    prompt_tokens=512,
    output_tokens=48,
    burst=2,
    rates=(1.0, 8.0),
    duration=4.0,
)


def server_flags(setup: Setup, name: str, load_requests: int, itl_target_ms: float) -> tuple[str, tuple[str, ...]]:
    """The server's backend, and the flags that it has beside those of all."""
    if name == DENSE:
        return setup.dense_backend, ()
    policies = {
        FIXED: (),
        LOAD: ("--tokenselect-policy", "load", "--tokenselect-load-requests", str(load_requests)),
        SLO: ("--tokenselect-policy", "slo", "--tokenselect-itl-target-ms", f"{itl_target_ms:g}"),
    }
    return TOKENSELECT, (*setup.sparse_flags, *policies[name])


def write_model(setup: Setup, folder: Path) -> Path:
    """A folder that SGLang loads with --load-format dummy, with a tokenizer for server and client."""
    write_tokenizer(folder, setup.model["vocab_size"])
    return cells.write_model(folder, setup.model)


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """Token 7 is the word t7. No token is special, so that each has a text."""
    words = {f"t{number}": number for number in range(vocab_size)}
    model = {"type": "WordLevel", "vocab": words, "unk_token": "t0"}
    tokenizer = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "WhitespaceSplit"}, "model": model}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
