# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints with random weights, written once per test session."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

SMALL = {
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}


def write_model(folder: Path, architecture: str, **config: Any) -> Path:
    """A random model of a causal LM of transformers, such as "Llama" or "Qwen3", seeded, in float32."""
    import torch
    import transformers

    torch.manual_seed(11)
    config_class = getattr(transformers, f"{architecture}Config")
    model = getattr(transformers, f"{architecture}ForCausalLM")(config_class(**{**SMALL, **config}))
    with torch.no_grad():
        for parameter in model.parameters():  # spread the logits: no near-ties in greedy decoding
            if parameter.dim() > 1:
                parameter.mul_(4.0)
    model.save_pretrained(folder)
    return folder


def write_config(folder: Path, model_type: str, architecture: str, **config: Any) -> Path:
    """A config.json alone, for models that are refused before their weights are read."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {**SMALL, "model_type": model_type, "architectures": [architecture], "torch_dtype": "float32", **config}
    (folder / "config.json").write_text(json.dumps(content))
    return folder
