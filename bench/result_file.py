# SPDX-License-Identifier: Apache-2.0
"""Result files: CSV under comment lines that say where and how it was measured, and what a measurement is told by."""

from __future__ import annotations

import csv
import os
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile."""
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return deciles[4], deciles[1], deciles[7]


def commit() -> str:
    """Of the checkout, or BENCH_COMMIT where there is no repository."""
    if named := os.environ.get("BENCH_COMMIT"):
        return named
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return git.stdout.strip() or "unknown"


def write_csv(path: str | Path, rows: Sequence[Mapping[str, object]], about: Mapping[str, str], command: str) -> None:
    """Rows under comment lines ``# name: value``: what the numbers depend on, and the command that repeats them.

    Columns are those of all rows, in the order in which they first appear.
    """
    columns = list(dict.fromkeys(name for row in rows for name in row))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        file.writelines(f"# {name}: {value}\n" for name, value in {**about, "command": command}.items())
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def read_csv(path: Path) -> tuple[dict[str, str], list[dict[str, str]]]:
    """The comment lines as a dict, and the rows."""
    lines = path.read_text().splitlines()
    about = dict(line[2:].split(": ", 1) for line in lines if line.startswith("# ") and ": " in line)
    return about, list(csv.DictReader(line for line in lines if not line.startswith("#")))


def read_csvs(paths: Sequence[Path]) -> tuple[dict[str, str], list[dict[str, str]]]:
    """The comment lines of all files, the later ones prevailing, and their rows one after the other."""
    files = [read_csv(path) for path in paths]
    about = {name: value for comments, _ in files for name, value in comments.items()}
    return about, [row for _, rows in files for row in rows]
