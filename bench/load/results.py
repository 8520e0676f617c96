# SPDX-License-Identifier: Apache-2.0
"""Result files of run.py, read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.load.setups import SERVERS
from bench.result_file import read_csvs

Row = dict[str, str]


def read_results(paths: Sequence[Path]) -> tuple[dict[str, str], list[Row]]:
    """The files' comment lines, the later ones prevailing, and their rows in order of rate and server."""
    about, rows = read_csvs(paths)
    return about, sorted(rows, key=lambda row: (float(row["rate"]), SERVERS.index(row["server"])))


def number(row: Row, column: str) -> float | None:
    """None where there is none: the cell failed, or the server has no such number."""
    text = row.get(column)
    return float(text) if text else None
