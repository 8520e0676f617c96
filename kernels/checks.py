# SPDX-License-Identifier: Apache-2.0
"""Checks of what is given to the kernels: each refusal says name, expected, got."""

from __future__ import annotations

from collections.abc import Sequence

import torch

HALF_DTYPES = (torch.bfloat16, torch.float16)


def expect(name: str, tensor: torch.Tensor, shape: Sequence[int | None], *dtypes: torch.dtype) -> None:
    """Raises ValueError unless ``tensor`` has one of ``dtypes``, ``shape`` (None: any size) and no holes in a row."""
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}: expected dtype {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    sizes = zip(shape, tensor.shape, strict=False)
    if tensor.dim() != len(shape) or any(want not in (None, got) for want, got in sizes):
        expected = ["any" if size is None else size for size in shape]
        raise ValueError(f"{name}: expected shape {expected}, got {list(tensor.shape)}")
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        raise ValueError(f"{name}: expected a contiguous last dimension, got stride {tensor.stride(-1)}")
