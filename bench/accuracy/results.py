# SPDX-License-Identifier: Apache-2.0
"""Reads result files of run.py: cells, and what they say of the seeds."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

Row = Mapping[str, str]
ALL_TASKS = "all"
OURS = "vote"
"""The variant that others are held against."""


@dataclass(frozen=True)
class Cell:
    """Mean over seeds, and the standard deviation of theirs; `questions` are those of all seeds."""

    mean: float
    spread: float
    questions: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.spread:.3f}"


Cells = dict[tuple[str, str, int, str], Cell]
"""By variant, budget, length and task; of all tasks together under ALL_TASKS, each weighing the same."""


def read_cells(rows: Iterable[Row]) -> Cells:
    by_seed: dict[tuple[str, str, int, str], dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for task in (row["task"], ALL_TASKS):
            by_seed[row["variant"], row["budget"], int(row["length"]), task][row["seed"]].append(row)
    return {key: _cell(seeds.values()) for key, seeds in by_seed.items()}


def _cell(seeds: Iterable[list[Row]]) -> Cell:
    means = [statistics.fmean(float(row["score"]) for row in rows) for rows in seeds]
    questions = sum(int(row["questions"]) for rows in seeds for row in rows)
    return Cell(statistics.fmean(means), statistics.stdev(means) if len(means) > 1 else 0.0, questions)


def order(cells: Cells, place: int) -> list:
    """What stands at this place of the cells' keys, in order of appearance."""
    return list(dict.fromkeys(key[place] for key in cells))
