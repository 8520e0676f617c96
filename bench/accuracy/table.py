# SPDX-License-Identifier: Apache-2.0
"""Prints result files of run.py as Markdown.

    python bench/accuracy/table.py bench/results/accuracy_policies.csv
    python bench/accuracy/table.py bench/results/accuracy_reuse.csv

Cells are the mean over seeds and the standard deviation of theirs; all tasks weigh the same. Of policies, a column
each, and below the cells of single tasks in which another one did better than `vote`.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # as a script, this file sees its own folder only

from bench.accuracy.experiments import DENSE, WINDOWS
from bench.accuracy.results import ALL_TASKS, OURS, Cells, Row, order, read_cells
from bench.result_file import read_csv
from sglang_tokenselect.selectors import SELECTORS


def print_policies(cells: Cells) -> None:
    lengths, budgets = order(cells, 2), [budget for budget in order(cells, 1) if budget]
    names = [*SELECTORS, DENSE]
    print(f"| budget (attended) | tokens | {' | '.join(names)} |\n|{'---|' * (len(names) + 2)}")
    for budget in budgets:
        for length in lengths:
            found = [cells.get((name, "" if name == DENSE else budget, length, ALL_TASKS)) for name in names]
            attended = min(int(budget) + WINDOWS, length)
            shown = " | ".join(str(cell or "") for cell in found)
            print(f"| {int(budget):,} ({attended:,}) | {length:,} | {shown} |")


def print_better(cells: Cells) -> None:
    """Cells of single tasks in which another policy did better than ours."""
    print(f"\n| task | budget | tokens | {OURS} | better |\n|---|---|---|---|---|")
    compared = {key: cell for key, cell in cells.items() if key[0] == OURS and key[3] != ALL_TASKS}
    for (_, budget, length, task), ours in compared.items():
        others = {other: cells.get((other, budget, length, task)) for other in SELECTORS if other != OURS}
        better = [f"{other} {cell}" for other, cell in others.items() if cell and cell.mean > ours.mean]
        if better:
            print(f"| {task} | {int(budget):,} | {length:,} | {ours} | {', '.join(better)} |")
    least = min(cell.questions for cell in compared.values())
    print(f"\n{len(compared)} cells in all, of {least} questions or more.")


def print_variants(cells: Cells, rows: list[Row]) -> None:
    """A line for each variant and length."""
    tasks = [task for task in order(cells, 3) if task != ALL_TASKS]
    print(f"| variant | tokens | hit ratio | {' | '.join((*tasks, 'mean'))} |\n|{'---|' * (len(tasks) + 4)}")
    ratios = {(row["variant"], int(row["length"])): row["hit_ratio"] for row in rows}
    for name, length in ratios:
        shown = " | ".join(str(cells[name, "", length, task]) for task in (*tasks, ALL_TASKS))
        print(f"| {name} | {length:,} | {ratios[name, length]} | {shown} |")


def main() -> None:
    _, rows = read_csv(Path(sys.argv[1]))
    cells = read_cells(rows)
    if OURS in order(cells, 0):
        print_policies(cells)
        print_better(cells)
    else:
        print_variants(cells, rows)


if __name__ == "__main__":
    main()
