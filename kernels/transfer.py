# SPDX-License-Identifier: Apache-2.0
"""From the host to the device without waiting for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

Tree = TypeVar("Tree")

ALIGNMENT = 4
"""Tensors packed into one begin at multiples of 16 bytes: Triton compiles a kernel anew for other alignments."""


def aligned(count: int) -> int:
    """At least so many numbers, so that what is packed behind them is aligned."""
    return -(-count // ALIGNMENT) * ALIGNMENT


def pinned(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """``tensor`` as a copy to the device should have it: one from pageable memory would wait for the stream."""
    return tensor.pin_memory() if torch.device(device).type == "cuda" else tensor


def int32(numbers: Sequence) -> torch.Tensor:
    """Numbers as the kernels read them, on the host."""
    return torch.tensor(numbers, dtype=torch.int32)


def to_device(tree: Tree, device: torch.device | str) -> Tree:
    """``tree`` with all of its tensors on the device, in one copy that the host does not wait for.

    Args:
        tree: host tensors of one dtype in any nesting of dataclasses and tuples.
    """
    tensors: list[torch.Tensor] = []
    _map_tensors(tree, tensors.append)
    padded = [torch.nn.functional.pad(tensor.flatten(), (0, -tensor.numel() % ALIGNMENT)) for tensor in tensors]
    packed = pinned(torch.cat(padded), device).to(device, non_blocking=True)
    pieces = packed.split([piece.numel() for piece in padded])
    moved = (piece[: tensor.numel()].view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True))
    return _map_tensors(tree, lambda _: next(moved))


def _map_tensors(tree: Any, function: Callable[[torch.Tensor], Any]) -> Any:
    """``tree`` with ``function(tensor)`` in place of each tensor, always in the same order."""
    if isinstance(tree, torch.Tensor):
        return function(tree)
    if isinstance(tree, tuple):
        return tuple(_map_tensors(item, function) for item in tree)
    if dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        fields = {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree)}
        return dataclasses.replace(tree, **{name: _map_tensors(item, function) for name, item in fields.items()})
    return tree
