# SPDX-License-Identifier: Apache-2.0
"""What each layer attended to in a decode step: a recording without its padding."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sglang_tokenselect.recording.recording import Recording


@dataclass(frozen=True)
class Row:
    """What one layer attended to in one step.

    Attributes:
        positions: [t] int64, ascending.
        weights: [t] float16; of each token the greatest attention probability that any head gives it.
    """

    positions: np.ndarray
    weights: np.ndarray


@dataclass(frozen=True)
class Step:
    """One decode step.

    Attributes:
        seq_len: cached tokens; the query is the last of them.
        layers: numbers of the attention layers.
        rows: one per layer; None where the layer attended to everything.
    """

    seq_len: int
    layers: tuple[int, ...]
    rows: tuple[Row | None, ...]

    @classmethod
    def of_recording(cls, recording: Recording) -> Step:
        rows = zip(recording.attended, recording.weights, strict=True)
        return cls(recording.seq_len, tuple(recording.layers.tolist()), tuple(_row(*row) for row in rows))


def _row(attended: np.ndarray, weights: np.ndarray) -> Row | None:
    """`attended` and `weights` are padded; no position at all stands for everything."""
    is_token = attended >= 0
    return Row(attended[is_token].astype(np.int64), weights[is_token]) if is_token.any() else None
