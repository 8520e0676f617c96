# SPDX-License-Identifier: Apache-2.0
"""Draws time against context length from a result file of run.py.

    python bench/kernels/plot.py bench/results/selection_h200.csv docs/selection_h200.png

Takes the rows whose ``figure`` is "context", one panel per number of requests and heads. The title's machine and
problem come from the file's comment lines ``# gpu: ...`` and ``# setting: ...``.
"""

from __future__ import annotations

import argparse
import io
import sys
import textwrap
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # as a script, this file sees its own folder only

from bench.result_file import read_csv

# Okabe and Ito's colours that carry on white; markers tell the series apart without them.
STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#000000", "v"), ("#E69F00", "P"))
INK = "#222222"
DPI = 192  # twice a screen's 96
PANEL_INCHES = (5.0, 4.4)
LABEL_INCHES = 1.8
LETTERS_PER_INCH = 11.5  # of the title
LABEL_POINTS = 9
LABEL_GAP = 1.35  # between label centres, in heights of their text


@dataclass(frozen=True)
class Point:
    context: int
    median_us: float
    p20_us: float
    p80_us: float


# Panels by title, then series by name, in the file's order.
Panels = dict[str, dict[str, list[Point]]]


def panel_title(row: dict[str, str]) -> str:
    plural = "" if row["requests"] == "1" else "s"
    return f"{row['requests']} request{plural}, query / KV heads {row['heads']}"


def read_results(path: Path, figure: str) -> tuple[dict[str, str], Panels]:
    """The file's comment lines, and the rows of ``figure``."""
    about, rows = read_csv(path)
    panels: Panels = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["figure"] == figure:
            point = Point(int(row["context"]), *(float(row[name]) for name in ("median_us", "p20_us", "p80_us")))
            panels[panel_title(row)][row["series"]].append(point)
    if not panels:
        raise SystemExit(f"{path} has no row whose figure is {figure!r}")
    return about, panels


def token_label(tokens: float, _position: int | None = None) -> str:
    if tokens >= 2**20:
        return f"{tokens / 2**20:.3g}M"
    return f"{tokens / 2**10:.3g}k"


def draw_panel(axes: Axes, series: dict[str, list[Point]], styles: dict[str, tuple[str, str]]) -> None:
    for name, points in series.items():
        points.sort(key=lambda point: point.context)
        contexts = [point.context for point in points]
        color, marker = styles[name]
        axes.fill_between(
            contexts, [p.p20_us for p in points], [p.p80_us for p in points], color=color, alpha=0.25, linewidth=0
        )
        axes.plot(contexts, [p.median_us for p in points], color=color, marker=marker, markersize=4.5, linewidth=1.7)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(sorted({point.context for points in series.values() for point in points}))
    axes.xaxis.set_major_formatter(FuncFormatter(token_label))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda time, _: f"{time:,.0f}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(color="#DDDDDD", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.03)
    axes.set_xlabel("context (tokens)", color=INK)


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Moves label heights apart to at least ``gap``, each crowd around its own middle."""
    crowds: list[list[float]] = []  # each: its members' wanted heights, ascending
    for height in sorted(heights):
        crowds.append([height])
        while len(crowds) > 1 and _bottom(crowds[-1], gap) - _top(crowds[-2], gap) < gap:
            last = crowds.pop()
            crowds[-1].extend(last)
    placed = [_bottom(crowd, gap) + i * gap for crowd in crowds for i in range(len(crowd))]
    by_height = sorted(range(len(heights)), key=lambda i: heights[i])
    return [placed[by_height.index(i)] for i in range(len(heights))]


def _bottom(crowd: Sequence[float], gap: float) -> float:
    return sum(crowd) / len(crowd) - (len(crowd) - 1) * gap / 2


def _top(crowd: Sequence[float], gap: float) -> float:
    return _bottom(crowd, gap) + (len(crowd) - 1) * gap


def label_ends(axes: Axes, ends: Sequence[tuple[str, tuple[float, float], str]]) -> None:
    """Names at the right edge, each led to the end of its line.

    Args:
        ends: name, last point and color of each line.
    """
    pixels = [axes.transData.transform(end)[1] for _, end, _ in ends]
    gap = LABEL_GAP * LABEL_POINTS * axes.figure.dpi / 72
    to_axes = axes.transAxes.inverted()
    for (name, end, color), height in zip(ends, spread(pixels, gap), strict=True):
        axes.annotate(
            name,
            xy=end,
            xytext=(1.05, to_axes.transform((0, height))[1]),
            textcoords="axes fraction",
            annotation_clip=False,
            va="center",
            fontsize=LABEL_POINTS,
            color=INK,
            arrowprops={"arrowstyle": "-", "linestyle": ":", "color": color, "shrinkA": 2, "shrinkB": 4},
        )


def draw(comments: dict[str, str], panels: Panels) -> Figure:
    names = list(dict.fromkeys(name for series in panels.values() for name in series))
    if len(names) > len(STYLES):
        raise SystemExit(f"{len(names)} series, but only {len(STYLES)} that can be told apart: {names}")
    styles = dict(zip(names, STYLES, strict=False))
    width, height = PANEL_INCHES
    size = (width * len(panels) + LABEL_INCHES, height)
    figure, rows = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False, layout="constrained")
    last_panel = {name: panel for panel, series in panels.items() for name in series}
    for axes, (panel, series) in zip(rows[0], panels.items(), strict=True):
        draw_panel(axes, series, styles)
        axes.set_title(panel, loc="left", fontsize=10, color=INK)
    rows[0][0].set_ylabel("time per layer (µs)", color=INK)
    machine = ", ".join(comments[name] for name in ("gpu", "setting") if name in comments)
    title = "Time to select one layer's tokens in a decode step (attention over them not included),\n"
    title += "beside dense attention over all; median, band from 20th to 80th percentile"
    wrapped = textwrap.fill(machine, int(size[0] * LETTERS_PER_INCH))
    figure.suptitle(f"{title}\n{wrapped}", x=0.01, ha="left", fontsize=10, color=INK)
    figure.canvas.draw()  # the labels' places depend on the final scales
    for axes, (panel, series) in zip(rows[0], panels.items(), strict=True):
        shown = {name: points[-1] for name, points in series.items() if last_panel[name] == panel}
        label_ends(axes, [(name, (end.context, end.median_us), styles[name][0]) for name, end in shown.items()])
    return figure


def save(figure: Figure, path: Path) -> None:
    """As a PNG with a palette, a third the size of one without."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with io.BytesIO() as full:
        figure.savefig(full, dpi=DPI, facecolor="white")
        Image.open(full).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(path, "PNG", optimize=True)


def draw_files(description: str, draw: Callable[[Sequence[Path]], Figure]) -> None:
    """A script's command line: result files, and the image to draw of them."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="CSV files")
    parser.add_argument("image", type=Path, help="PNG file to write")
    args = parser.parse_args()
    save(draw(args.results), args.image)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="CSV file")
    parser.add_argument("image", type=Path, help="PNG file to write")
    parser.add_argument("--figure", default="context", help="rows to draw, by their column figure")
    args = parser.parse_args()
    save(draw(*read_results(args.results, args.figure)), args.image)


if __name__ == "__main__":
    main()
