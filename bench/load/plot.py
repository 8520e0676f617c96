# SPDX-License-Identifier: Apache-2.0
"""Draws result files of run.py over the arrival rate, a line for each server.

    python bench/load/plot.py OUT.csv [...] docs/load_h200.png

The title's machine and setting come from the files' comment lines ``# gpu: ...`` and ``# setting: ...``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # as a script, this file sees its own folder only

from bench.kernels.plot import INK, STYLES, draw_files
from bench.load.results import Row, number, read_results
from bench.load.setups import FIXED, LOAD, SLO
from bench.serve.cells import DENSE

SIZE_INCHES = (12.6, 7.2)
# Server: its name in the figure and its place in STYLES.
SERIES = {DENSE: ("dense", 4), FIXED: ("TokenSelect, fixed", 0), LOAD: ("policy load", 2), SLO: ("policy slo", 1)}
# Column: the panel's title.
PANELS = {
    "itl_p50_ms": "Time between tokens, P50 (ms)",
    "itl_p99_ms": "Time between tokens, P99 (ms)",
    "ttft_p50_s": "Time to the first token, P50 (s)",
    "output_tokens_per_s": "Output tokens per second",
    "mean_level": "Effort level, mean of the decode queries",
    "mean_budget": "Budget (tokens), mean of the decode queries",
}
TARGET_PANEL = "itl_p50_ms"
LOG_PANEL = "itl_p99_ms"  # a step, or the prefills of others


def draw_panel(axes: Axes, rows: Sequence[Row], column: str) -> None:
    for server, (label, place) in SERIES.items():
        found = [(float(row["rate"]), number(row, column)) for row in rows if row["server"] == server]
        points = [(rate, value) for rate, value in found if value is not None]
        if points:
            color, marker = STYLES[place]
            rates, values = zip(*points, strict=True)
            style = {"color": color, "marker": marker, "label": label, "clip_on": False}  # level 0 is the panel's edge
            axes.plot(rates, values, markersize=4.5, linewidth=1.7, **style)
    axes.set_title(PANELS[column], loc="left", fontsize=10, color=INK)
    if column == LOG_PANEL:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


def draw_target(axes: Axes, target_ms: float) -> None:
    axes.axhline(target_ms, color=INK, linestyle=":", linewidth=1.2)
    axes.annotate(
        f"target of policy slo: {target_ms:g} ms",
        (0.02, target_ms),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        fontsize=8,
        color=INK,
    )


def draw(comments: dict[str, str], rows: Sequence[Row]) -> Figure:
    figure, grid = plt.subplots(2, 3, figsize=SIZE_INCHES, layout="constrained")
    panels = dict(zip(PANELS, grid.flat, strict=True))
    for column, axes in panels.items():
        draw_panel(axes, rows, column)
    if "itl_target_ms" in comments:
        draw_target(panels[TARGET_PANEL], float(comments["itl_target_ms"]))
    for axes in grid[-1]:
        axes.set_xlabel("arriving requests per second", color=INK)
    machine = ", ".join(comments[name] for name in ("gpu", "setting") if name in comments)
    title = f"SGLang under load, dense and with TokenSelect\n{machine}\n{comments.get('requests', '')}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=10, color=INK)
    handles, labels = panels[TARGET_PANEL].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(SERIES), frameon=False)
    return figure


if __name__ == "__main__":
    draw_files(__doc__, lambda paths: draw(*read_results(paths)))
