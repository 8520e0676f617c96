# SPDX-License-Identifier: Apache-2.0
"""Keys and values of a float8 pool are read with the scales that they were written with, and no others are.

Symptom without it: the loader of `--quantization-param-path` sets the scales that SGLang divides by when it writes
(`k_scale`, `v_scale`) and not those that its FlashInfer backend multiplies by when it reads (`k_scale_float`,
`v_scale_float`), so that all keys and values are off by them. And it multiplies by a checkpoint's scales even where the
pool has the model's dtype and nothing was divided.
Seam: these attributes of each RadixAttention. Not a hook: it needs the loaded model, so the backend calls it when it is
built, before a layer attends.
May go when SGLang's FlashInfer backend reads the scales that were written with (not so in 0.5.23).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeAlias

import torch

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention

Scale: TypeAlias = torch.Tensor | float | None


def settle_scales(layers: Sequence[RadixAttention], kv_dtype: torch.dtype) -> None:
    """Makes the scales for reading those for writing.

    Args:
        layers: all of the model.
        kv_dtype: of the pool.
    """
    is_scaled = kv_dtype == torch.float8_e4m3fn
    for layer in layers:
        layer.k_scale_float = _as_float(layer.k_scale) if is_scaled else None
        layer.v_scale_float = _as_float(layer.v_scale) if is_scaled else None


def read_scales(layer: RadixAttention) -> tuple[float, float]:
    """What stored keys and values of a layer are multiplied by. No host sync."""
    return _or_one(layer.k_scale_float), _or_one(layer.v_scale_float)


def write_scales(layer: RadixAttention) -> tuple[Scale, Scale]:
    """What SGLang's pool divides keys and values of a layer by before it stores them, in place; None: by nothing."""
    return (
        None if layer.k_scale_float is None else layer.k_scale,
        None if layer.v_scale_float is None else layer.v_scale,
    )


def are_scaled(layers: Sequence[RadixAttention]) -> bool:
    """Whether any layer stores keys or values that differ from the model's by a factor."""
    return any(read_scales(layer) != (1.0, 1.0) for layer in layers)


def _as_float(scale: Scale) -> float | None:
    return None if scale is None else float(scale)


def _or_one(scale: float | None) -> float:
    return 1.0 if scale is None else scale
