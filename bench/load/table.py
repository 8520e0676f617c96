# SPDX-License-Identifier: Apache-2.0
"""Prints result files of run.py as one markdown table: python bench/load/table.py OUT.csv [...]"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # as a script, this file sees its own folder only

from bench.load.results import Row, number, read_results

# Title: the columns that it shows, and their format.
MEASURED = {
    "ITL P50 / P99, ms": (("itl_p50_ms", "itl_p99_ms"), ".1f"),
    "TTFT P50 / P99, s": (("ttft_p50_s", "ttft_p99_s"), ".2f"),
    "output tokens/s": (("output_tokens_per_s",), ".0f"),
}
EFFORT = {"mean level": ("mean_level", ".2f"), "mean budget": ("mean_budget", ".0f"), "hit ratio": ("hit_ratio", ".2f")}


def table(rows: Sequence[Row]) -> str:
    """One line for each rate and server."""
    titles = ["requests/s", "server", *MEASURED, *EFFORT]
    lines = [line(titles), "|" + "---|" * len(titles)]
    for row in rows:
        measured = [
            " / ".join(shown(row, column, digits, missing="failed") for column in columns)
            for columns, digits in MEASURED.values()
        ]
        effort = [shown(row, *column, missing="") for column in EFFORT.values()]
        lines.append(line([f"{float(row['rate']):g}", row["server"], *measured, *effort]))
    return "\n".join(lines)


def shown(row: Row, column: str, digits: str, missing: str) -> str:
    value = number(row, column)
    return missing if value is None else f"{value:{digits}}"


def line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    print(table(read_results([Path(path) for path in sys.argv[1:]])[1]))
