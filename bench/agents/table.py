# SPDX-License-Identifier: Apache-2.0
"""Prints result files of run.py as one markdown table: python bench/agents/table.py OUT.csv [...]"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # as a script, this file sees its own folder only

from bench.agents.setups import EFFORTS, SERVERS
from bench.load.results import Row
from bench.load.table import line, shown
from bench.result_file import read_csvs

# Title: median, 20th and 80th percentile.
SPREADS = {
    "ITL, ms": (("itl_p50_ms", "itl_p20_ms", "itl_p80_ms"), ".1f"),
    "TTFT, s": (("ttft_p50_s", "ttft_p20_s", "ttft_p80_s"), ".2f"),
}
MEASURED = {
    "output tokens/s": ("output_tokens_per_s", ".0f"),
    "while all decode": ("decode_tokens_per_s", ".0f"),
    "radix hits": ("radix_hit_ratio", ".2f"),
    "selection hits": ("hit_ratio", ".2f"),
    "shared": ("shared_ratio", ".2f"),
}


def table(rows: Sequence[Row]) -> str:
    """One line for each turn and server; of a spread, the median and the percentiles in brackets."""
    titles = ["workload", "agents", "turn", "server", "requests", *SPREADS, *MEASURED]
    lines = [line(titles), "|" + "---|" * len(titles)]
    for row in sorted(rows, key=_order):
        server = " ".join(filter(None, (row["server"], row["effort"])))
        spreads = [_spread(row, *columns) for columns in SPREADS.values()]
        measured = [shown(row, *column, missing="") for column in MEASURED.values()]
        cell = [row["workload"], row["agents"], row["turn"], server, _requests(row)]
        lines.append(line([*cell, *spreads, *measured]))
    return "\n".join(lines)


def _order(row: Row) -> tuple[str, int, int, int, int]:
    effort = list(EFFORTS).index(row["effort"]) if row["effort"] else 0
    return row["workload"], int(row["agents"]), int(row["turn"]), list(SERVERS).index(row["server"]), effort


def _requests(row: Row) -> str:
    """Of a turn without numbers, `failed`."""
    if not row["requests"]:
        return "failed"
    return row["requests"] + (f", {row['failed']} failed" if int(row["failed"]) else "")


def _spread(row: Row, columns: Sequence[str], digits: str) -> str:
    median, *ends = (shown(row, column, digits, missing="") for column in columns)
    return f"{median} ({' to '.join(ends)})" if median else ""


if __name__ == "__main__":
    print(table(read_csvs([Path(path) for path in sys.argv[1:]])[1]))
