# SPDX-License-Identifier: Apache-2.0
"""The numbers of an evaluation, from its records alone."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sglang_tokenselect.evaluation.settings import Key, Run
from sglang_tokenselect.evaluation.store import Record


@dataclass(frozen=True)
class SeedCell:
    """A target's questions of one task, length and seed. `score` is the mean of those answered; None without one."""

    target: str
    task: str
    length: int
    seed: int
    questions: int
    errors: int
    score: float | None


@dataclass(frozen=True)
class Cell:
    """A target's questions of one task and length.

    Attributes:
        mean: of the seeds' means, for those that have one; None without any.
        spread: standard deviation of the seeds' means; None for less than two.
        questions, errors, missing: answered, failed, and not asked yet.
    """

    target: str
    task: str
    length: int
    mean: float | None
    spread: float | None
    questions: int
    errors: int
    missing: int

    @property
    def is_whole(self) -> bool:
        return not self.errors and not self.missing


@dataclass(frozen=True)
class DepthCell:
    """A target's answered questions of one length and depth, over all tasks that have a depth, and all seeds."""

    target: str
    depth: float
    length: int
    questions: int
    score: float


def seed_cells(run: Run, records: Mapping[Key, Record]) -> list[SeedCell]:
    """In the order of targets, tasks, lengths, seeds."""
    found: defaultdict[tuple[str, str, int, int], list[Record]] = defaultdict(list)
    for key, record in records.items():
        found[key[:4]].append(record)
    settings = run.settings
    return [
        _seed_cell((target, task, length, seed), found[target, task, length, seed])
        for target in run.targets
        for task in settings.tasks
        for length in sorted(settings.lengths)
        for seed in sorted(settings.seeds)
    ]


def _seed_cell(where: tuple[str, str, int, int], records: Sequence[Record]) -> SeedCell:
    scores = [record.score for record in records if record.score is not None]
    # fmean rounds the exact sum, so the order in which the answers came changes no digit.
    mean = statistics.fmean(scores) if scores else None
    return SeedCell(*where, len(scores), len(records) - len(scores), mean)


def cells(run: Run, by_seed: Iterable[SeedCell]) -> list[Cell]:
    groups = defaultdict(list)
    for cell in by_seed:
        groups[cell.target, cell.task, cell.length].append(cell)
    return [_cell(where, group, run.settings.samples) for where, group in groups.items()]


def _cell(where: tuple[str, str, int], seeds: Sequence[SeedCell], samples: int) -> Cell:
    mean, spread = mean_and_spread([cell.score for cell in seeds if cell.score is not None])
    questions, errors = sum(cell.questions for cell in seeds), sum(cell.errors for cell in seeds)
    return Cell(*where, mean, spread, questions, errors, samples * len(seeds) - questions - errors)


def mean_and_spread(scores: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation, each None where there are too few."""
    mean = statistics.fmean(scores) if scores else None
    return mean, statistics.stdev(scores) if len(scores) > 1 else None


def differences(run: Run, by_seed: Sequence[SeedCell]) -> dict[tuple[str, int], tuple[float | None, float | None]]:
    """The second target's score less the first's, by task and length: mean and spread over the seeds of both.

    Empty if there are not two targets.
    """
    if len(run.targets) != 2:
        return {}
    first, second = ({cell_key(c): c.score for c in by_seed if c.target == name} for name in run.targets)
    found: defaultdict[tuple[str, int], list[float]] = defaultdict(list)
    for (task, length, seed), score in first.items():
        other = second[task, length, seed]
        found[task, length] += [other - score] if score is not None and other is not None else []
    return {where: mean_and_spread(values) for where, values in found.items()}


def cell_key(cell: SeedCell) -> tuple[str, int, int]:
    return cell.task, cell.length, cell.seed


def has_depth_score(record: Record) -> bool:
    return record.score is not None and record.depth is not None


def depth_cells(records: Mapping[Key, Record]) -> list[DepthCell]:
    found: defaultdict[tuple[str, float, int], list[float]] = defaultdict(list)
    for record in records.values():
        if record.score is not None and record.depth is not None:
            found[record.target, record.depth, record.length].append(record.score)
    return [DepthCell(*where, len(scores), statistics.fmean(scores)) for where, scores in sorted(found.items())]
