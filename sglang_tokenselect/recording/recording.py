# SPDX-License-Identifier: Apache-2.0
"""A recording: one request's decode step in all layers, as a .npz file."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Recording:
    """
    Attributes:
        seq_len: cached tokens of the request, that of the query included.
        req_pool_idx: the request's row of `req_to_token`.
        layers: [L] int32, layer_id of the attention layers, ascending.
        attended: [L, t_max] int32, positions ascending, padded with -1; a row of all -1: everything was attended to.
        weights: [L, t_max] float16, the largest attention probability that any head gives the token, among those
            attended to; 0 beside a -1.
        budgets: [B] int32, ascending.
        mass, recall, error: [L, B, num_qo_heads] float32, see fidelity.measure.Fidelity.
    """

    seq_len: int
    req_pool_idx: int
    layers: np.ndarray
    attended: np.ndarray
    weights: np.ndarray
    budgets: np.ndarray
    mass: np.ndarray
    recall: np.ndarray
    error: np.ndarray

    @classmethod
    def load(cls, path: Path) -> Recording:
        with np.load(path) as arrays:
            values = {field.name: arrays[field.name] for field in fields(cls)}
        return cls(**{name: value.item() if value.ndim == 0 else value for name, value in values.items()})

    def save(self, path: Path) -> None:
        """Whole or not at all: whoever lists the folder meanwhile reads no half of it."""
        partial = path.with_suffix(".partial")
        with partial.open("wb") as file:
            np.savez_compressed(file, **{field.name: getattr(self, field.name) for field in fields(self)})
        os.replace(partial, path)


def recording_paths(directory: Path) -> list[Path]:
    """In the order in which they were written; step by step, and of one step by request. Other files may lie beside."""
    return sorted(directory.glob("[0-9]" * 8 + "-*.npz"))
