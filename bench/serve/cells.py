# SPDX-License-Identifier: Apache-2.0
"""What is measured: the model's shape, the servers and their flags, and the cells."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

# Llama-3-8B. Weights are random: speed does not depend on them, only on which tokens a selection finds similar.
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "torch_dtype": "bfloat16",
    "rope_theta": 500000.0,
    "max_position_embeddings": 300000,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}

# Of every server. The radix cache stays on; it is emptied before each cell.
FLAGS = (
    *("--load-format", "dummy", "--skip-tokenizer-init", "--grammar-backend", "none"),
    *("--cuda-graph-backend-prefill", "disabled", "--cuda-graph-max-bs-decode", "32"),
    *("--context-length", "300000", "--dtype", "bfloat16", "--random-seed", "0", "--stream-interval", "1"),
)

DENSE = "dense"
_MISS = ("--tokenselect-max-reuse", "1", "--tokenselect-min-len", "0")
_FP8 = ("--kv-cache-dtype", "fp8_e4m3")
_LOCAL = ("--tokenselect-min-len", "0", "--tokenselect-vote", "local")
# Name: backend, and the flags that this server alone has.
SERVERS = {
    DENSE: ("flashinfer", ()),
    # Every step votes.
    "miss": ("tokenselect", _MISS),
    # 63 of 64 steps reuse.
    "hit": ("tokenselect", ("--tokenselect-theta", "-1", "--tokenselect-min-len", "0")),
    "default": ("tokenselect", ()),
    # With --tp: the ranks exchange nothing, in voting steps and in others.
    "miss-local": ("tokenselect", ("--tokenselect-max-reuse", "1", *_LOCAL)),
    "hit-local": ("tokenselect", ("--tokenselect-theta", "-1", *_LOCAL)),
    "dense-fp8": ("flashinfer", _FP8),
    "miss-fp8": ("tokenselect", (*_MISS, *_FP8)),
}

ONE_GPU = ("dense", "miss", "hit", "default")
NEW_TOKENS = 96  # of each request in an ITL cell
WARM_UP_CONTEXTS = (2048, 20_000)

# Requests x tokens of each prompt.
ITL_CELLS = (
    *((1, 1024), (1, 4096), (1, 8192), (1, 16384), (1, 32768), (1, 65536), (1, 131072)),
    *((8, 4096), (8, 8192), (8, 16384), (8, 32768)),
    *((32, 4096), (32, 8192)),
    (4, 131072),
)
TTFT_CONTEXTS = (512, 1024, 2048, 8192, 32768, 131072, 262144)

# Server: its ITL cells and its TTFT contexts.
PLAN = {
    DENSE: (ITL_CELLS, TTFT_CONTEXTS),
    "miss": (ITL_CELLS, ()),
    "hit": (ITL_CELLS, ()),
    "default": (((1, 1024), (8, 32768)), TTFT_CONTEXTS),
    "miss-local": (ITL_CELLS, ()),
    "hit-local": (ITL_CELLS, ()),
    "dense-fp8": (ITL_CELLS, ()),
    "miss-fp8": (ITL_CELLS, ()),
}
QUICK = (((1, 1024), (4, 2048)), (512, 1024))


def ttft_repeats(context: int) -> int:
    """Requests of one TTFT cell: more where they are short, and noise weighs more."""
    if context <= 2048:
        return 40
    if context <= 32768:
        return 5
    return 2 if context <= 131072 else 1  # the dense server needs most of a minute for the longest


def parse_cell(text: str) -> tuple[int, int]:
    """'8x32768' to (8, 32768)."""
    batch, context = text.split("x")
    return int(batch), int(context)


def plan_of(
    server: str, itl: Sequence[tuple[int, int]] | None, ttft: Sequence[int] | None, quick: bool
) -> tuple[Sequence[tuple[int, int]], Sequence[int]]:
    """The server's ITL cells and TTFT contexts; a choice of either replaces both."""
    if itl is not None or ttft is not None:
        return itl or (), ttft or ()
    return QUICK if quick else PLAN[server]


def write_model(folder: Path, model: Mapping[str, object] = MODEL) -> Path:
    """A folder that SGLang loads with --load-format dummy."""
    (folder / "config.json").write_text(json.dumps(model))
    return folder
