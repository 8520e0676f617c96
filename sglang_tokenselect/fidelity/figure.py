# SPDX-License-Identifier: Apache-2.0
"""The measures as a picture: each head at the configured budget, and each layer's error at all budgets."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sglang_tokenselect.fidelity.summary import Summary

_TITLES = {
    "mass": "Attention mass kept",
    "recall": "Recall of each head's best tokens",
    "error": "Relative output error",
}


def write_figure(summary: Summary, max_error: float, path: Path) -> None:
    figure = Figure(figsize=(12, 9), layout="constrained")
    config = summary.config
    figure.suptitle(
        f"budget {config.budget}, sink {config.sink}, local {config.local}, {config.positions} positions; "
        f"means of {summary.num_queries} decode queries with at least {summary.num_candidates:,} candidates"
    )
    axes = figure.subplots(2, 2).flat
    for ax, name in zip(axes, _TITLES, strict=False):
        _draw_heads(ax, summary, name)
    _draw_budgets(axes[-1], summary, max_error)
    figure.savefig(path, dpi=110)


def _draw_heads(ax: Axes, summary: Summary, name: str) -> None:
    values = getattr(summary, name)[:, summary.configured]
    is_error = name == "error"
    image = ax.imshow(
        values,
        aspect="auto",
        origin="lower",
        cmap="magma_r" if is_error else "viridis",
        vmin=0,
        vmax=max(float(values.max()), 1e-6) if is_error else 1,
    )
    ax.figure.colorbar(image, ax=ax)
    ax.set(title=_TITLES[name], xlabel="query head", ylabel="layer")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    step = -(-len(summary.layers) // 16)
    ax.set_yticks(range(0, len(summary.layers), step), summary.layers[::step])


def _draw_budgets(ax: Axes, summary: Summary, max_error: float) -> None:
    # A colour bar names the layers: a legend of 80 would hide them.
    colors = ScalarMappable(Normalize(summary.layers[0], max(summary.layers[-1], summary.layers[0] + 1)), "viridis")
    places = range(len(summary.budgets))
    for layer, error in zip(summary.layers, summary.error.mean(-1), strict=True):
        ax.plot(places, error, marker="o", markersize=3, color=colors.to_rgba(layer))
    ax.figure.colorbar(colors, ax=ax, label="layer").locator = MaxNLocator(integer=True)
    ax.axhline(max_error, color="black", linewidth=0.8, linestyle="--", label=f"--max-error {max_error:g}")
    ax.axvline(summary.configured, color="grey", linewidth=0.8, linestyle=":", label="configured budget")
    ax.set_xticks(places, summary.budgets)
    ax.set(title="Error against budget, mean of the heads", xlabel="budget, tokens", ylabel="relative output error")
    ax.set_ylim(bottom=0)
    ax.legend(loc="upper right")
