# SPDX-License-Identifier: Apache-2.0
"""Flags of a server with float8 keys and values, scaled as SGLang's `--quantization-param-path` tells."""

from __future__ import annotations

import json
from pathlib import Path

FLAGS = ("--kv-cache-dtype", "fp8_e4m3")


def scaled_flags(folder: Path, num_layers: int, scale: float) -> tuple[str, ...]:
    """
    Args:
        folder: where the file of scales is written.
        scale: of keys and values of every layer.
    """
    path = folder / "kv_scales.json"
    by_layer = {str(layer): scale for layer in range(num_layers)}
    scales = {"dtype": "float8_e4m3fn", "scaling_factor": {"0": by_layer}}
    path.write_text(json.dumps({"model_type": "llama", "kv_cache": scales}))
    return (*FLAGS, "--quantization-param-path", str(path))
