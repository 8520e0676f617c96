# SPDX-License-Identifier: Apache-2.0
"""Draws time between tokens and time to the first token against context length, from result files of run.py.

    python bench/serve/plot.py OUT.csv [...] docs/serving_h200.png

The title's machine and setting come from the files' comment lines ``# gpu: ...`` and ``# setting: ...``.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # as a script, this file sees its own folder only

from bench.kernels.plot import INK, STYLES, draw_files, label_ends, token_label
from bench.serve.cells import DENSE
from bench.serve.results import Measured, Results, read_results

SIZE_INCHES = (12.6, 4.8)
# Server: its name in the figure and its place in STYLES.
SERIES = {
    DENSE: ("dense", 4),
    "miss": ("no reuse", 1),
    "hit": ("reuse in 63 of 64 steps", 0),
    "default": ("TokenSelect", 0),
}
ITL_BATCHES = {1: "-", 8: "--"}  # requests: line style


@dataclass(frozen=True)
class Line:
    label: str
    color: str
    marker: str
    dashes: str
    points: dict[int, Measured]  # by context, ascending


def line_of(results: Results, metric: str, server: str, batch: int, label: str, dashes: str) -> list[Line]:
    """One line, or none where the files have no numbers for it."""
    cells = results.get(metric, {})
    points = {context: by_server.get(server) for (size, context), by_server in cells.items() if size == batch}
    points = {context: measured for context, measured in points.items() if measured}
    color, marker = STYLES[SERIES[server][1]]
    return [Line(label, color, marker, dashes, points)] if points else []


def itl_lines(results: Results) -> list[Line]:
    lines = []
    for batch, dashes in ITL_BATCHES.items():
        requests = f"{batch} request{'s' if batch > 1 else ''}"
        for server in (DENSE, "miss", "hit"):
            label = f"{SERIES[server][0]}, {requests}"
            lines += line_of(results, "ITL ms", server, batch, label, dashes)
    return lines


def ttft_lines(results: Results) -> list[Line]:
    return [line for name in (DENSE, "default") for line in line_of(results, "TTFT s", name, 1, SERIES[name][0], "-")]


def draw_panel(axes: Axes, lines: list[Line]) -> None:
    for line in lines:
        contexts, measured = list(line.points), line.points.values()
        low, high = [m.low for m in measured], [m.high for m in measured]
        axes.fill_between(contexts, low, high, color=line.color, alpha=0.2, linewidth=0)
        style = {"color": line.color, "marker": line.marker, "linestyle": line.dashes}
        axes.plot(contexts, [m.median for m in measured], markersize=4.5, linewidth=1.7, **style)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({context for line in lines for context in line.points}))
    axes.xaxis.set_major_formatter(FuncFormatter(token_label))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.03)
    axes.set_xlabel("context (tokens)", color=INK)


def use_log_seconds(axes: Axes) -> None:
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda seconds, _: f"{seconds:g}"))
    axes.yaxis.set_minor_locator(NullLocator())


def end_of(line: Line) -> tuple[str, tuple[float, float], str]:
    """For label_ends."""
    context, measured = list(line.points.items())[-1]
    return line.label, (context, measured.median), line.color


def draw(comments: dict[str, str], results: Results) -> Figure:
    figure, (itl, ttft) = plt.subplots(1, 2, figsize=SIZE_INCHES, layout="constrained")
    panels = ((itl, itl_lines(results)), (ttft, ttft_lines(results)))
    for axes, lines in panels:
        draw_panel(axes, lines)
    itl.set_ylim(bottom=0)
    use_log_seconds(ttft)
    itl.set_title("Time between tokens", loc="left", fontsize=10, color=INK)
    itl.set_ylabel("ITL (ms)", color=INK)
    ttft.set_title("Time to the first token, one request", loc="left", fontsize=10, color=INK)
    ttft.set_ylabel("TTFT (s)", color=INK)
    machine = ", ".join(comments[name] for name in ("gpu", "setting") if name in comments)
    title = "SGLang with FlashInfer's dense attention and with TokenSelect; medians,\n"
    title += "band from 20th to 80th percentile (first token: from minimum to maximum)"
    figure.suptitle(f"{title}\n{machine}", x=0.01, ha="left", fontsize=10, color=INK)
    figure.canvas.draw()  # the labels' places depend on the final scales
    for axes, lines in panels:
        label_ends(axes, [end_of(line) for line in lines])
    return figure


if __name__ == "__main__":
    draw_files(__doc__, lambda paths: draw(*read_results(paths)))
