# SPDX-License-Identifier: Apache-2.0
"""Means over prompts and steps: as CSV, as a table, and what they advise."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sglang_tokenselect.config import TokenSelectConfig
from sglang_tokenselect.recording.recording import Recording

MEASURES = ("mass", "recall", "error")
# Of the heads of a layer, the one that a selection serves worst.
_WORST = {"mass": np.min, "recall": np.min, "error": np.max}


@dataclass(frozen=True)
class Summary:
    """
    Attributes:
        config: of the server.
        num_queries: decode queries of each layer that the means are over.
        num_candidates: of the shortest of them; a budget that holds them all chooses nothing.
        layers: [L], those that can be measured: not those with a sliding window.
        budgets: [B] ascending.
        mass, recall, error: [L, B, num_qo_heads], see fidelity.measure.Fidelity.
    """

    config: TokenSelectConfig
    num_queries: int
    num_candidates: int
    layers: tuple[int, ...]
    budgets: tuple[int, ...]
    mass: np.ndarray
    recall: np.ndarray
    error: np.ndarray

    @classmethod
    def of(cls, recordings: Sequence[Recording], config: TokenSelectConfig) -> Summary:
        """
        Args:
            recordings: at least one, each with a layer that is measured.
        """
        first = recordings[0]
        is_measured = np.isfinite(first.error).all((1, 2))
        shortest = min(recording.seq_len for recording in recordings)
        return cls(
            config=config,
            num_queries=len(recordings),
            num_candidates=shortest - config.sink - config.local,
            layers=tuple(first.layers[is_measured].tolist()),
            budgets=tuple(first.budgets.tolist()),
            **{name: np.mean([getattr(r, name)[is_measured] for r in recordings], axis=0) for name in MEASURES},
        )

    @property
    def configured(self) -> int:
        """Index of the configured budget."""
        return self.budgets.index(self.config.budget)

    def write_csv(self, path: Path) -> None:
        """One row per layer, head and budget."""
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("layer", "head", "budget", *MEASURES))
            for i, layer in enumerate(self.layers):
                for head in range(self.error.shape[2]):
                    for b, budget in enumerate(self.budgets):
                        values = (f"{getattr(self, name)[i, b, head]:.6g}" for name in MEASURES)
                        writer.writerow((layer, head, budget, *values))

    def table(self) -> str:
        """Per layer at the configured budget: the mean of the heads, and the worst head."""
        lines = [f"{'layer':>5}  " + "  ".join(f"{name:>7}  {'worst':>7}" for name in MEASURES)]
        for i, layer in enumerate(self.layers):
            cells = []
            for name in MEASURES:
                heads = getattr(self, name)[i, self.configured]
                cells.append(f"{heads.mean():7.3f}  {_WORST[name](heads):7.3f}")
            lines.append(f"{layer:5}  " + "  ".join(cells))
        return "\n".join(lines)

    def advice(self, max_error: float) -> str:
        """Layers whose heads' mean error exceeds `max_error` are to be dense; the others as cheap as that allows."""
        error = self.error.mean(-1)  # [L, B]
        exceeds = error[:, self.configured] > max_error
        lossy = [layer for layer, is_lossy in zip(self.layers, exceeds, strict=True) if is_lossy]
        budget, limit = self.config.budget, f"a mean output error of {max_error:g}"
        if not lossy:
            lines = [f"No layer exceeds {limit} at a budget of {budget}."]
        elif len(lossy) == len(self.layers):
            lines = [f"All layers exceed {limit} at a budget of {budget}; dense layers would leave none that selects."]
        else:
            lines = [f"Layers {_listed(lossy)} exceed {limit} at a budget of {budget}."]
            if self.config.is_compact:
                lines.append("They cannot be made dense: with compact positions all layers select.")
            else:
                lines.append(f"To attend to everything there: --tokenselect-dense-layers {_listed(lossy)}")
        keeps_all = len(lossy) == len(self.layers) or self.config.is_compact
        counted = np.ones_like(exceeds) if keeps_all else ~exceeds
        lines.append(self._advise_budget(error[counted], max_error, "all" if counted.all() else "all other"))
        return "\n".join(lines)

    def _advise_budget(self, error: np.ndarray, max_error: float, whom: str) -> str:
        """
        Args:
            error: [layers that select, B].
        """
        fits = [
            budget
            for budget, worst in zip(self.budgets, error.max(0), strict=True)
            if worst <= max_error and budget < self.num_candidates
        ]
        if fits:
            return f"The least measured budget at which {whom} layers stay below it: --tokenselect-budget {fits[0]}"
        return f"At no measured budget below the {self.num_candidates:,} candidates do {whom} layers stay below it."


def _listed(layers: Sequence[int]) -> str:
    return ",".join(map(str, layers))
