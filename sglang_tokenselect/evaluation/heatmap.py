# SPDX-License-Identifier: Apache-2.0
"""The figures of an evaluation: score by depth and length, and by task and length, a panel for each target."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from sglang_tokenselect.evaluation.scores import Cell, DepthCell
from sglang_tokenselect.evaluation.settings import Run

# Its order can be seen without colours: dark is low, and its ends differ for all kinds of colour blindness.
COLOURS = "cividis"
EMPTY = "#E4E4E4"
INK = "#222222"
DPI = 160
CELL_INCHES = (0.72, 0.36)
LEAST_PANEL_INCHES = 2.2
# The colour bar and the row's title; the figure's title, the panels' and the lengths.
BESIDE_INCHES, ABOVE_AND_BELOW_INCHES = 1.3, 1.6
LETTER_INCHES = 0.07  # of a row's label
LETTERS_PER_INCH = 11.5  # of the title
MANY_LENGTHS = 6  # beyond, their labels stand aslant

# Score by row and length.
Scores = Mapping[tuple[Any, int], float | None]


@dataclass(frozen=True)
class Grid:
    """What the panels of a figure have in common: `rows` are keys of scores with their labels, from the top down."""

    rows: Mapping[Any, str]
    lengths: Sequence[int]
    title: str
    label: str


def write_figures(
    folder: Path, run: Run, cells: Sequence[Cell], depths: Sequence[DepthCell], depth_tasks: Sequence[str]
) -> None:
    """tasks.png, and heatmap.png if any answer is to a question with a depth.

    Args:
        depth_tasks: those that `depths` are the mean of.
    """
    settings, lengths = run.settings, sorted(run.settings.lengths)
    seeds = f"{len(settings.seeds)} seed{'s' if len(settings.seeds) > 1 else ''}"
    title = f"Score by task and length\n{settings.samples} questions a cell and seed, {seeds}"
    by_task = {name: {(c.task, c.length): c.mean for c in cells if c.target == name} for name in run.targets}
    grid = Grid({task: task for task in settings.tasks}, lengths, title, "")
    save(draw(grid, by_task), folder / "tasks.png")
    if depths:
        by_depth = {name: {(c.depth, c.length): c.score for c in depths if c.target == name} for name in run.targets}
        rows = {depth: f"{depth:.0%}" for depth in sorted({cell.depth for cell in depths})}
        title = f"Score by depth and length\n{', '.join(depth_tasks)}; {seeds}"
        save(draw(Grid(rows, lengths, title, "depth of the fact (0%: start)"), by_depth), folder / "heatmap.png")


def draw(grid: Grid, targets: Mapping[str, Scores]) -> Figure:
    """A panel for each target, in one scale from 0 to 1."""
    size = figure_size(grid, len(targets))
    figure, panels = plt.subplots(
        1, len(targets), figsize=size, squeeze=False, sharex=True, sharey=True, layout="constrained"
    )
    for axes, (name, scores) in zip(panels[0], targets.items(), strict=True):
        image = draw_panel(axes, grid, scores)
        axes.set_title(name, loc="left", fontsize=10, color=INK, parse_math=False)
        axes.set_xlabel("length (tokens)", fontsize=9, color=INK)
    panels[0][0].set_ylabel(grid.label, fontsize=9, color=INK)
    bar = figure.colorbar(image, ax=panels[0].tolist(), aspect=30, pad=0.02)
    bar.set_label("mean score", fontsize=9, color=INK)
    bar.ax.tick_params(labelsize=8, colors=INK)
    bar.outline.set_visible(False)
    head, _, rest = grid.title.partition("\n")
    width = int(LETTERS_PER_INCH * size[0])
    figure.suptitle(f"{head}\n{textwrap.fill(rest, width)}", x=0.01, ha="left", fontsize=10, color=INK)
    return figure


def draw_panel(axes: Axes, grid: Grid, scores: Scores) -> AxesImage:
    """Each cell in its colour, with its number; grey where there is no score."""
    values = [[scores.get((row, length)) for length in grid.lengths] for row in grid.rows]
    shown = np.array(values, dtype=float)  # None becomes nan
    image = axes.imshow(shown, cmap=plt.get_cmap(COLOURS).with_extremes(bad=EMPTY), vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(shown):
        text = "–" if np.isnan(value) else f"{value:.2f}"
        colour = "black" if np.isnan(value) or value > 0.5 else "white"
        axes.text(column, row, text, ha="center", va="center", fontsize=8, color=colour)
    many = len(grid.lengths) > MANY_LENGTHS
    style = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if many else {}
    axes.set_xticks(range(len(grid.lengths)), [f"{length:,}" for length in grid.lengths], fontsize=8, **style)
    axes.set_yticks(range(len(grid.rows)), list(grid.rows.values()), fontsize=8)
    axes.tick_params(length=0, colors=INK)
    axes.spines[:].set_visible(False)
    axes.set_xticks(np.arange(1, len(grid.lengths)) - 0.5, minor=True)
    axes.set_yticks(np.arange(1, len(grid.rows)) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=1.5)
    axes.tick_params(which="minor", length=0)
    return image


def figure_size(grid: Grid, num_panels: int) -> tuple[float, float]:
    width, height = CELL_INCHES
    labels = LETTER_INCHES * max(map(len, grid.rows.values()))
    panels = num_panels * max(width * len(grid.lengths), LEAST_PANEL_INCHES)
    return labels + panels + BESIDE_INCHES, height * len(grid.rows) + ABOVE_AND_BELOW_INCHES


def save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
