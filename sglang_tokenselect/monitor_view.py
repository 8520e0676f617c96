# SPDX-License-Identifier: Apache-2.0
"""How snapshots are shown in a terminal."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from sglang_tokenselect.snapshot import Snapshot

HISTORY = 60
"""Snapshots in a sparkline: about a minute of them."""
BARS, ASCII_BARS = "▁▂▃▄▅▆▇█", "_.-~=+*#"
LATE_SECONDS = 3.0
"""Without a message for so long, the view says so."""
LADDER_REACH = 8
"""Levels shown on either side of the present one."""
MIN_SPARKLINE = 10
"""Columns; with less room there are no sparklines."""
TEXT_COLUMNS = 70
"""Columns of names and values, as long as nothing wraps."""


class MonitorView:
    """The latest snapshot, with sparklines of those before it."""

    def __init__(self, endpoint: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._endpoint = endpoint
        self._clock = clock
        self._history: deque[Snapshot] = deque(maxlen=HISTORY)
        self._received = 0.0

    def add(self, snapshot: Snapshot) -> None:
        self._history.append(snapshot)
        self._received = self._clock()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not self._history:
            yield Text(f"waiting for messages from {self._endpoint}")
            return
        yield self._title()
        width = min(options.max_width - TEXT_COLUMNS, HISTORY)
        has_room = width >= MIN_SPARKLINE and len(self._history) > 1
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True, overflow="crop", style="dim")
        table.add_column(overflow="fold")
        if has_room:
            table.add_column(no_wrap=True, style="cyan")
        lines = self._sparklines(width, ASCII_BARS if options.ascii_only else BARS) if has_room else {}
        for name, value in rows(self._history[-1]):
            table.add_row(name, value, *([lines.get(name, "")] if has_room else []))
        yield table

    def _title(self) -> Text:
        title = Text.assemble(("TokenSelect", "bold"), f" at {self._endpoint}")
        age = self._clock() - self._received
        if age > LATE_SECONDS:
            title.append(f", last message {age:.0f} s ago", "yellow")
        return title

    def _sparklines(self, width: int, bars: str) -> dict[str, str]:
        latest, history = self._history[-1], list(self._history)[-width:]
        itls = [snapshot.itl_ms for snapshot in history]
        return {
            "level": sparkline(
                [snapshot.level for snapshot in history], latest.highest_level, latest.lowest_level, bars
            ),
            "between tokens": sparkline(itls, 0.0, max(itl or 0.0 for itl in itls), bars),
            "hit ratio": sparkline([snapshot.hit_ratio for snapshot in history], 0.0, 1.0, bars),
        }


def rows(snapshot: Snapshot) -> Iterator[tuple[str, Text]]:
    """Names and values, in the order in which they are shown."""
    counters = snapshot.counters

    def count(name: str) -> str:
        return f"{counters.get(name, 0):,}"

    yield "policy", Text(f"{snapshot.policy}, level changes so far: {snapshot.level_changes:,}")
    yield "level", Text(f"{ladder(snapshot)}  (higher is cheaper)")
    yield (
        "effort",
        Text(f"budget {snapshot.budget:,}, theta {snapshot.theta:.2f}, reuse up to {snapshot.max_reuse:,} steps"),
    )
    yield "between tokens", _judged("{:.2f} ms", snapshot.itl_ms, "target", snapshot.itl_target_ms, is_upper=True)
    yield "attended", Text(f"{_percent(snapshot.attended_share)} of the cached tokens")
    yield "hit ratio", Text(f"{_percent(snapshot.hit_ratio)} of the selections were reused")
    yield "attention mass", _judged("{:.3f}", snapshot.mass, "floor", snapshot.min_mass, is_upper=False)
    yield "requests", Text(f"{snapshot.running:,} running, {snapshot.waiting:,} waiting")
    yield "kv cache", Text(f"{_percent(snapshot.kv_usage)} in use")
    yield (
        "decode queries",
        Text(
            f"{count('decode_queries')}, {count('dense_queries')} dense, {count('shared_queries')} shared, "
            f"{count('uncached_queries')} uncached"
        ),
    )
    yield "selections", Text(f"{count('votes')} votes, {count('reuses')} reuses, {count('block_votes')} for prefill")
    yield "tokens", Text(f"{count('attended_tokens')} attended, {snapshot.tokens_not_read:,} not read")


def one_line(snapshot: Snapshot) -> str:
    return (
        f"{time.strftime('%H:%M:%S')}  {snapshot.policy} level {snapshot.level}  budget {snapshot.budget}  "
        f"itl {_number('{:.2f} ms', snapshot.itl_ms)}  attended {_percent(snapshot.attended_share)}  "
        f"hits {_percent(snapshot.hit_ratio)}  mass {_number('{:.3f}', snapshot.mass)}  "
        f"running {snapshot.running}  waiting {snapshot.waiting}  kv {_percent(snapshot.kv_usage)}"
    )


def ladder(snapshot: Snapshot) -> str:
    """The levels from the highest to the lowest, such as `-1  0 [1] 2  3  4`."""
    level = snapshot.level
    first, last = max(snapshot.highest_level, level - LADDER_REACH), min(snapshot.lowest_level, level + LADDER_REACH)
    return "".join(f"[{rung}]" if rung == level else f" {rung} " for rung in range(first, last + 1)).strip()


def sparkline(values: Sequence[float | None], low: float, high: float, bars: str) -> str:
    """One character per value, the first of `bars` for `low` and the last for `high`; a space for None."""
    scale = (len(bars) - 1) / (high - low) if high > low else 0.0
    places = (None if value is None else round((value - low) * scale) for value in values)
    return "".join(" " if place is None else bars[min(max(place, 0), len(bars) - 1)] for place in places)


def _judged(form: str, value: float | None, name: str, limit: float | None, *, is_upper: bool) -> Text:
    """A value beside its limit, green if it keeps it."""
    text = _number(form, value)
    if limit is None:
        return Text(text)
    text += f", {name} {form.format(limit)}"
    if value is None:
        return Text(text)
    return Text(text, "green" if (value <= limit if is_upper else value >= limit) else "red")


def _percent(share: float | None) -> str:
    return _number("{:.1%}", share)


def _number(form: str, value: float | None) -> str:
    return "-" if value is None else form.format(value)
