# SPDX-License-Identifier: Apache-2.0
"""How far a run is: a bar for each target in a terminal, lines anywhere else."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from sglang_tokenselect.evaluation.settings import Key
from sglang_tokenselect.evaluation.store import Record

SECONDS_BETWEEN_LINES = 10.0


class Tally:
    """Counts of one target. Work is in tokens, since a question takes time by its length.

    Attributes:
        total: questions.
        tokens_left: of those to be asked now.
    """

    def __init__(self, keys: Sequence[Key], records: Mapping[Key, Record]) -> None:
        self.total = len(keys)
        asked = [records[key] for key in keys if key in records]
        self.scores = [record.score for record in asked if record.score is not None]
        self.errors = 0
        self.tokens_left = sum(key.length for key in keys if key not in records or records[key].error is not None)
        self._tokens_done = 0
        self._begin = time.monotonic()

    def add(self, record: Record) -> None:
        self.tokens_left -= record.length
        self._tokens_done += record.length
        if record.score is not None:
            self.scores.append(record.score)
        else:
            self.errors += 1

    def text(self) -> str:
        mean = f"mean score {sum(self.scores) / len(self.scores):.3f}" if self.scores else "no score yet"
        errors = f", {self.errors} failed" if self.errors else ""
        return f"{len(self.scores):,} of {self.total:,} answered, {mean}{errors}"

    def seconds_left(self) -> float | None:
        """As if all tokens took the same time; None before the first."""
        elapsed = time.monotonic() - self._begin
        return elapsed * self.tokens_left / self._tokens_done if self._tokens_done else None


class View(Protocol):
    def add(self, record: Record) -> None:
        """Counts one more answer or failure."""


@contextmanager
def open_view(console: Console, tallies: Mapping[str, Tally]) -> Iterator[View]:
    if not console.is_terminal or console.is_dumb_terminal:
        view = PlainView(console, tallies)
        yield view
        view.finish()
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[text]}", markup=False),
        TimeRemainingColumn(compact=True),
    )
    # A bar's speed is that of the last minutes: long texts come last.
    with Progress(*columns, console=console, speed_estimate_period=300) as progress:
        yield BarView(progress, tallies)


class PlainView:
    """A line for each target every ten seconds, and at the end."""

    def __init__(self, console: Console, tallies: Mapping[str, Tally]) -> None:
        self._console = console
        self._tallies = tallies
        self._next = dict.fromkeys(tallies, 0.0)

    def add(self, record: Record) -> None:
        tally, now = self._tallies[record.target], time.monotonic()
        tally.add(record)
        if now >= self._next[record.target]:
            self._next[record.target] = now + SECONDS_BETWEEN_LINES
            left = tally.seconds_left()
            self._print(record.target, f"{tally.text()}, about {left:,.0f} s left")

    def finish(self) -> None:
        for name, tally in self._tallies.items():
            self._print(name, tally.text())

    def _print(self, name: str, text: str) -> None:
        self._console.print(f"{name}: {text}", markup=False, highlight=False, soft_wrap=True)


class BarView:
    def __init__(self, progress: Progress, tallies: Mapping[str, Tally]) -> None:
        self._progress = progress
        self._tallies = tallies
        self._bars = {
            name: progress.add_task(name, total=tally.tokens_left, text=tally.text()) for name, tally in tallies.items()
        }

    def add(self, record: Record) -> None:
        tally = self._tallies[record.target]
        tally.add(record)
        self._progress.update(self._bars[record.target], advance=record.length, text=tally.text())
