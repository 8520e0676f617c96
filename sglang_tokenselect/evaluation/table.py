# SPDX-License-Identifier: Apache-2.0
"""The table of an evaluation: a line for each task and target, a column for each length."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from rich.console import Console

from sglang_tokenselect.evaluation.scores import Cell, SeedCell, cells, differences
from sglang_tokenselect.evaluation.settings import Run

MEAN = "mean of tasks"
NO_SCORE = "-"
NOT_WHOLE = "*"


def print_table(console: Console, run: Run, by_seed: Sequence[SeedCell]) -> None:
    rows = list(table_rows(run, by_seed))
    header = ["task", "target", *(f"{length:,}" for length in sorted(run.settings.lengths))]
    # Lines and no frame: a terminal that is too narrow breaks lines, not cells.
    for line in (*plain_lines([header, *rows]), *notes(run, by_seed)):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def table_rows(run: Run, by_seed: Sequence[SeedCell]) -> Iterator[list[str]]:
    """Texts of the lines. With two targets, a third line for each task has the second's score less the first's."""
    found = {(cell.task, cell.target, cell.length): cell for cell in cells(run, by_seed)}
    apart, lengths = differences(run, by_seed), sorted(run.settings.lengths)
    for task in run.settings.tasks:
        for target in run.targets:
            yield [task, target, *(cell_text(found[task, target, length]) for length in lengths)]
        if apart:
            yield [task, "difference", *(score_text(*apart[task, length], signed=True) for length in lengths)]
    if len(run.settings.tasks) > 1:
        for target in run.targets:
            columns = [[found[task, target, length] for task in run.settings.tasks] for length in lengths]
            yield [MEAN, target, *map(mean_text, columns)]


def cell_text(cell: Cell) -> str:
    return score_text(cell.mean, cell.spread) + ("" if cell.is_whole else NOT_WHOLE)


def mean_text(column: Sequence[Cell]) -> str:
    """Of the tasks that have a score."""
    means = [cell.mean for cell in column if cell.mean is not None]
    text = score_text(statistics.fmean(means) if means else None, None)
    return text + ("" if all(cell.is_whole for cell in column) else NOT_WHOLE)


def score_text(mean: float | None, spread: float | None, signed: bool = False) -> str:
    if mean is None:
        return NO_SCORE
    # Adding 0.0 makes a rounded -0.000 a plain zero.
    text = f"{round(mean, 3) + 0.0:+.3f}" if signed else f"{mean:.3f}"
    return text if spread is None else f"{text} ± {spread:.3f}"


def plain_lines(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns by spaces, texts left and numbers right, with a line below the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    header, *others = rows
    for row in (header, ["-" * width for width in widths], *others):
        pads = (str.ljust if column < 2 else str.rjust for column in range(len(row)))
        yield "  ".join(pad(text, width) for pad, text, width in zip(pads, row, widths, strict=True)).rstrip()


def notes(run: Run, by_seed: Sequence[SeedCell]) -> Iterator[str]:
    """What a reader must know to read the table."""
    settings = run.settings
    spread = " ± standard deviation over seeds" if len(settings.seeds) > 1 else ""
    yield f"Mean score, 0 to 1{spread}; {settings.samples} questions for each task, length and seed."
    if len(run.targets) == 2:
        first, second = run.targets
        yield f"difference: {second} less {first}."
    found = cells(run, by_seed)
    errors, missing = sum(cell.errors for cell in found), sum(cell.missing for cell in found)
    if errors or missing:
        yield f"{NOT_WHOLE} without questions that failed ({errors:,} in all) or were not asked yet ({missing:,})."
