# SPDX-License-Identifier: Apache-2.0
"""Result files of run.py, read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.result_file import read_csvs


@dataclass(frozen=True)
class Measured:
    """One row: milliseconds between tokens, or seconds to the first. For TTFT, low and high are its extremes."""

    median: float
    low: float
    high: float


# Metric ("ITL ms" or "TTFT s"), then (requests, tokens), then server; None where a cell failed.
Results = dict[str, dict[tuple[int, int], dict[str, Measured | None]]]


def read_results(paths: Sequence[Path]) -> tuple[dict[str, str], Results]:
    """The files' comment lines, the later ones prevailing, and their rows in order of requests and tokens."""
    about, rows = read_csvs(paths)
    results: Results = {}
    for row in sorted(rows, key=lambda row: (int(row["batch"]), int(row["context"]))):
        cells = results.setdefault(row["metric"], {})
        cells.setdefault((int(row["batch"]), int(row["context"])), {})[row["server"]] = _measured(row)
    return about, results


def _measured(row: dict[str, str]) -> Measured | None:
    if not row["median"]:
        return None
    return Measured(float(row["median"]), float(row["p20"]), float(row["p80"]))
