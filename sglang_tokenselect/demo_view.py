# SPDX-License-Identifier: Apache-2.0
"""How the demo shows itself: a live table in a terminal, plain rows as they come anywhere else."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from sglang_tokenselect.demo import Answer, Row

# Header, width without a terminal, justification.
Justify = Literal["left", "right"]
COLUMNS: tuple[tuple[str, int, Justify], ...] = (
    ("length", 6, "right"),
    ("asked for", 26, "left"),
    ("expected", 14, "left"),
    ("tokenselect", 22, "left"),
    ("attended", 12, "right"),
    ("time", 6, "right"),
    ("dense", 22, "left"),
    ("time", 6, "right"),
)
CAPTION = (
    "attended: tokens per decode step and layer, and their share of the cached tokens. "
    "The first question about a text reads it; the radix cache serves it to the others."
)
SAID_WIDTH = 14
# Lines that the live display takes beside its rows.
FRAME_HEIGHT = 8


class View(Protocol):
    def status(self, text: str) -> None:
        """Says what is going on from now on."""

    def add(self, row: Row) -> None:
        """Shows one more row."""


@contextmanager
def open_view(console: Console) -> Iterator[View]:
    if not console.is_terminal or console.is_dumb_terminal:
        yield PlainView(console)
        return
    view = LiveView(console)
    with Live(view, console=console, refresh_per_second=8):
        yield view
        view.status("")


class PlainView:
    """Prints each row, and each change of what is going on before the first row."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._has_rows = False

    def status(self, text: str) -> None:
        if not self._has_rows:
            self._print(text)

    def add(self, row: Row) -> None:
        if not self._has_rows:
            self._has_rows = True
            self._print(CAPTION)
            self._print_cells([header for header, _, _ in COLUMNS])
            self._print_cells(["-" * width for _, width, _ in COLUMNS])
        self._print_cells(cells(row))

    def _print_cells(self, texts: list[str]) -> None:
        pad = {"left": str.ljust, "right": str.rjust}
        columns = zip(texts, COLUMNS, strict=True)
        self._print("  ".join(pad[justify](text, width) for text, (_, width, justify) in columns).rstrip())

    def _print(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class LiveView:
    """A table that grows, above a line with what is going on and its seconds."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._rows: list[Row] = []
        self._status = ""
        self._since = time.monotonic()
        self._spinner = Spinner("dots")

    def status(self, text: str) -> None:
        self._status, self._since = text, time.monotonic()

    def add(self, row: Row) -> None:
        self._rows.append(row)

    def __rich__(self) -> RenderableType:
        if not self._status:
            return self._table(self._rows)
        self._spinner.update(text=f"{self._status} ({time.monotonic() - self._since:.0f} s)")
        # The last rows that fit, so that the line below them stays in sight; all of them at the end.
        room = max(3, self._console.height - FRAME_HEIGHT)
        return Group(self._table(self._rows[-room:]), self._spinner)

    def _table(self, rows: list[Row]) -> RenderableType:
        if not rows:
            return Text()
        table = Table(caption=CAPTION, caption_justify="left")
        for header, _, justify in COLUMNS:
            table.add_column(header, justify=justify, no_wrap=header in ("length", "time", "attended"))
        for row in rows:
            texts = [Text(text) for text in cells(row)]
            texts[3].stylize(_style(row.tokenselect))
            texts[6].stylize(_style(row.dense))
            table.add_row(*texts)
        return table


def cells(row: Row) -> list[str]:
    """The texts of a row, in the order of `COLUMNS`."""
    sparse, dense = row.tokenselect, row.dense
    attended = "-" if sparse.attended is None else f"{sparse.attended:,.0f} {sparse.attended_share:6.1%}"
    return [
        f"{row.length:,}",
        row.question,
        ", ".join(row.expected),
        verdict(sparse, row.task),
        attended,
        f"{sparse.seconds:.1f} s",
        verdict(dense, row.task),
        f"{dense.seconds:.1f} s",
    ]


def verdict(answer: Answer, task: str) -> str:
    """Right or wrong, and the variables or numbers in the answer; its text where there are none."""
    found = re.findall(r"\b[A-Z]{3}\b" if task == "variable_tracking" else r"\b\d{6}\b", answer.text)
    said = ", ".join(found) or answer.text or "(nothing)"
    if len(said) > SAID_WIDTH:
        said = said[: SAID_WIDTH - 1] + "…"
    return f"{'✓ right' if answer.is_right else '✗ wrong'} {said}"


def _style(answer: Answer) -> str:
    return "green" if answer.is_right else "red"
