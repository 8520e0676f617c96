# SPDX-License-Identifier: Apache-2.0
"""Prints result files of run.py as markdown: python bench/serve/table.py OUT.csv [...]"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # as a script, this file sees its own folder only

from bench.serve.cells import DENSE, SERVERS
from bench.serve.results import Measured, Results, read_results

Cells = dict[tuple[int, int], dict[str, Measured | None]]


def ttft_table(cells: Cells) -> list[str]:
    """Seconds by context, and how many times as fast as dense."""
    others = [name for name in _servers(cells) if name != DENSE]
    head = ["tokens", DENSE, *(title for name in others for title in (name, f"{name}: dense / it"))]
    lines = _head(head)
    for (_, context), by_server in cells.items():
        shown = [f"{context:,}", _shown(by_server, DENSE, 3)]
        for name in others:
            speedup = _ratio(by_server, DENSE, name)
            shown += [_shown(by_server, name, 3), f"{speedup:.2f}" if speedup else ""]
        lines.append(_line(shown))
    return lines


def itl_table(cells: Cells) -> list[str]:
    """Milliseconds by requests and context; in brackets the share of dense."""
    servers = _servers(cells)
    lines = _head(["requests x tokens", *servers])
    for (batch, context), by_server in cells.items():
        shown = [f"{batch} x {context:,}"]
        for name in servers:
            ratio = _ratio(by_server, name, DENSE) if name != DENSE else None
            shown.append(_shown(by_server, name, 2) + (f" ({ratio:.2f})" if ratio else ""))
        lines.append(_line(shown))
    return lines


def tables(results: Results) -> str:
    """Those of the metrics that were measured."""
    tables_of = {
        "TTFT s": ("TTFT, seconds: median", ttft_table),
        "ITL ms": ("ITL, milliseconds: median (x dense)", itl_table),
    }
    found = [(title, lines_of(results[metric])) for metric, (title, lines_of) in tables_of.items() if metric in results]
    return "\n\n".join("\n".join([title, "", *lines]) for title, lines in found)


def _servers(cells: Cells) -> list[str]:
    found = {name for by_server in cells.values() for name in by_server}
    return [name for name in SERVERS if name in found]


def _shown(by_server: dict[str, Measured | None], name: str, digits: int) -> str:
    if name not in by_server:
        return ""
    measured = by_server[name]
    return f"{measured.median:.{digits}f}" if measured else "failed"


def _ratio(by_server: dict[str, Measured | None], over: str, under: str) -> float | None:
    above, below = by_server.get(over), by_server.get(under)
    return above.median / below.median if above and below else None


def _head(titles: Sequence[str]) -> list[str]:
    return [_line(titles), "|" + "---|" * len(titles)]


def _line(shown: Sequence[str]) -> str:
    return f"| {' | '.join(shown)} |"


if __name__ == "__main__":
    print(tables(read_results([Path(path) for path in sys.argv[1:]])[1]))
