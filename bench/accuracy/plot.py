# SPDX-License-Identifier: Apache-2.0
"""Draws result files of run.py.

    python bench/accuracy/plot.py bench/results/accuracy_policies.csv docs/accuracy_policies.png
    python bench/accuracy/plot.py bench/results/accuracy_sub_block.csv bench/results/accuracy_reuse.csv \
        docs/accuracy_options.png

Of policies: score against length, a panel for each budget. Of options: score against the sub-block's size, and against
the share of selections that were reused. Bars are the standard deviation over seeds.
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
from matplotlib.ticker import FuncFormatter, NullLocator

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # as a script, this file sees its own folder only

from bench.accuracy.experiments import DENSE, WINDOWS
from bench.accuracy.results import ALL_TASKS, OURS, Cell, Cells, Row, order, read_cells
from bench.kernels.plot import INK, STYLES, draw_files
from bench.result_file import read_csv
from sglang_tokenselect.selectors import SELECTORS

PANEL_INCHES = (3.1, 3.5)


def draw_points(axes: Axes, points: Sequence[tuple[float, Cell]], place: int, label: str, line: str = "-") -> None:
    color, marker = STYLES[place]
    xs, cells = zip(*sorted(points, key=lambda point: point[0]), strict=True)
    axes.errorbar(
        xs,
        [cell.mean for cell in cells],
        yerr=[cell.spread for cell in cells],
        color=color,
        marker=marker,
        linestyle=line,
        label=label,
        markersize=4.5,
        linewidth=1.6,
        capsize=2.5,
        clip_on=False,
    )


def finish(axes: Axes, title: str, label: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.set_xlabel(label, fontsize=9, color=INK)
    axes.set_ylim(0, 1.02)
    axes.grid(color="#DDDDDD", linewidth=0.6)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def draw_policies(cells: Cells, rows: Sequence[Row], about: dict[str, str]) -> Figure:
    budgets, lengths = [budget for budget in order(cells, 1) if budget], order(cells, 2)
    size = (PANEL_INCHES[0] * len(budgets), PANEL_INCHES[1] + 0.6)
    figure, panels = plt.subplots(1, len(budgets), figsize=size, sharey=True, squeeze=False)
    for axes, budget in zip(panels[0], budgets, strict=True):
        for place, name in enumerate((*SELECTORS, DENSE)):
            found = [
                (length, cells.get((name, "" if name == DENSE else budget, length, ALL_TASKS))) for length in lengths
            ]
            if points := [(length, cell) for length, cell in found if cell]:
                draw_points(axes, points, place, name, "--" if name == DENSE else "-")
        axes.set_xscale("log", base=2)
        axes.set_xticks(lengths)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda length, _: f"{length / 1024:g}k"))
        axes.xaxis.set_minor_locator(NullLocator())
        finish(axes, f"budget {int(budget):,}, {int(budget) + WINDOWS:,} attended", "tokens of the prompt")
    panels[0][0].set_ylabel("score, mean of four tasks", fontsize=9, color=INK)
    panels[0][0].legend(frameon=False, fontsize=9, loc="lower left")
    return titled(figure, "Who is chosen, at equal attended tokens", rows, about)


def draw_options(cells: Cells, rows: Sequence[Row], about: dict[str, str]) -> Figure:
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.4))
    ratios = {(row["variant"], int(row["length"])): row["hit_ratio"] for row in rows}
    for place, length in enumerate(order(cells, 2)):
        names = [name for name in order(cells, 0) if (name, "", length, ALL_TASKS) in cells]
        score = {name: cells[name, "", length, ALL_TASKS] for name in names}
        sizes = [(float(name.split()[1]), score[name]) for name in names if name.startswith("sub_block")]
        thetas = [(float(ratios[name, length]), score[name]) for name in names if name.startswith("theta")]
        steps = [(float(ratios[name, length]), score[name]) for name in names if name.startswith("max_reuse")]
        draw_points(left, sizes, place, f"{length:,} tokens")
        draw_points(right, thetas, place, f"{length:,} tokens, by similarity")
        draw_points(right, steps, place + 2, f"{length:,} tokens, whatever the query", "--")
    left.set_xscale("log", base=2)
    left.xaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:g}"))
    finish(left, "Prefill: queries of a sub-block", "sub_block, of a block of 128")
    left.set_ylim(0.9, 1.005)
    finish(right, "Decode: selections that are reused", "hit ratio")
    left.set_ylabel("score, mean of four tasks", fontsize=9, color=INK)
    for axes in (left, right):
        axes.legend(frameon=False, fontsize=8, loc="lower left")
    return titled(figure, "What options cost", rows, about)


def titled(figure: Figure, title: str, rows: Sequence[Row], about: dict[str, str]) -> Figure:
    machines = about.get("machine") or ", ".join(dict.fromkeys(row["machine"] for row in rows))
    where = f"needle checkpoint, compact positions, {machines}, SGLang {about['sglang']}"
    figure.suptitle(f"{title}\n{where}", x=0.01, ha="left", fontsize=10.5, color=INK)
    figure.tight_layout()
    return figure


def draw(paths: Sequence[Path]) -> Figure:
    files = [read_csv(path) for path in paths]
    rows = [row for _, rows in files for row in rows]
    cells, about = read_cells(rows), files[0][0]
    return (draw_policies if OURS in order(cells, 0) else draw_options)(cells, rows, about)


if __name__ == "__main__":
    draw_files(__doc__, draw)
