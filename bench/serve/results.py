# SPDX-License-Identifier: Apache-2.0
"""Result files of run.py, read."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Measured:
    """One row: milliseconds between tokens, or seconds to the first. For TTFT, low and high are its extremes."""

    median: float
    low: float
    high: float


# Metric ("ITL ms" or "TTFT s"), then (requests, tokens), then server; None where a cell failed.
Results = dict[str, dict[tuple[int, int], dict[str, Measured | None]]]


def read_results(paths: Sequence[Path]) -> tuple[dict[str, str], Results]:
    """Comment lines ``# name: value`` as a dict, and the rows, in order of requests and tokens."""
    comments: dict[str, str] = {}
    rows: list[dict[str, str]] = []
    for path in paths:
        lines = path.read_text().splitlines()
        comments |= dict(line[2:].split(": ", 1) for line in lines if line.startswith("# ") and ": " in line)
        rows += csv.DictReader(line for line in lines if not line.startswith("#"))
    results: Results = {}
    for row in sorted(rows, key=lambda row: (int(row["batch"]), int(row["context"]))):
        cells = results.setdefault(row["metric"], {})
        cells.setdefault((int(row["batch"]), int(row["context"])), {})[row["server"]] = _measured(row)
    return comments, results


def _measured(row: dict[str, str]) -> Measured | None:
    if not row["median"]:
        return None
    return Measured(float(row["median"]), float(row["p20"]), float(row["p80"]))
