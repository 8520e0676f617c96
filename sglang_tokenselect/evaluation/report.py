# SPDX-License-Identifier: Apache-2.0
"""Writes results.json, results.csv and the figures of an evaluation, from run.json and samples.jsonl alone."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sglang_tokenselect.evaluation import heatmap
from sglang_tokenselect.evaluation.scores import SeedCell, cells, depth_cells, differences, has_depth_score, seed_cells
from sglang_tokenselect.evaluation.settings import Key, Run
from sglang_tokenselect.evaluation.store import Record, write_json

CSV_COLUMNS = ("target", "task", "length", "seed", "questions", "errors", "score")


def write_reports(folder: Path, run: Run, records: Mapping[Key, Record]) -> list[SeedCell]:
    """Returns the cells, for a table of them."""
    by_seed = seed_cells(run, records)
    write_json(folder / "results.json", results(run, records, by_seed))
    write_csv(folder / "results.csv", by_seed)
    asked = {record.task for record in records.values() if has_depth_score(record)}
    depth_tasks = [task for task in run.settings.tasks if task in asked]
    heatmap.write_figures(folder, run, cells(run, by_seed), depth_cells(records), depth_tasks)
    return by_seed


def results(run: Run, records: Mapping[Key, Record], by_seed: Sequence[SeedCell]) -> dict[str, Any]:
    return {
        **run.to_dict(),
        "cells": [asdict(cell) for cell in cells(run, by_seed)],
        "differences": [
            {"task": task, "length": length, "mean": mean, "spread": spread}
            for (task, length), (mean, spread) in differences(run, by_seed).items()
        ],
        "depths": [asdict(cell) for cell in depth_cells(records)],
        "errors": [{**key._asdict(), "error": record.error} for key, record in sorted(records.items()) if record.error],
    }


def write_csv(path: Path, by_seed: Sequence[SeedCell]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, CSV_COLUMNS, lineterminator="\n")
        writer.writeheader()
        for cell in by_seed:
            score = "" if cell.score is None else f"{cell.score:.6f}"
            writer.writerow({**asdict(cell), "score": score})
