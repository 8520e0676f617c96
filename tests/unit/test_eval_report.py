# SPDX-License-Identifier: Apache-2.0
"""The numbers of an evaluation, its table, its figures, and what is shown meanwhile."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import replace

import pytest
from evaluations import RUN, SETTINGS, record
from PIL import Image
from rich.console import Console

from sglang_tokenselect.evaluation import heatmap, table, view
from sglang_tokenselect.evaluation.report import write_reports
from sglang_tokenselect.evaluation.scores import cells, depth_cells, differences, seed_cells
from sglang_tokenselect.evaluation.settings import Key, Target

FIRST = ("needle_single", 1024)


def scored(**changes):
    """needle_single at 1,024 tokens: a has 1, 0 and 1, 1 for the seeds, b 0.5, 0 and 0, and a failure."""
    wanted = {("a", 0): (1.0, 0.0), ("a", 1): (1.0, 1.0), ("b", 0): (0.5, 0.0), ("b", 1): (0.0, None)}
    records = {}
    for (target, seed), scores in wanted.items():
        for index, score in enumerate(scores):
            key = Key(target, "needle_single", 1024, seed, index)
            records[key] = record(key, score, depth=float(index), error="lost" if score is None else None)
    return records


def test_means_spreads_and_what_is_missing():
    by_seed = seed_cells(RUN, scored())
    assert [(c.target, c.seed, c.questions, c.errors, c.score) for c in by_seed if (c.task, c.length) == FIRST] == [
        *(("a", 0, 2, 0, 0.5), ("a", 1, 2, 0, 1.0)),
        *(("b", 0, 2, 0, 0.25), ("b", 1, 1, 1, 0.0)),
    ]
    found = {(cell.target, cell.task, cell.length): cell for cell in cells(RUN, by_seed)}
    a, b, empty = (found[where] for where in (("a", *FIRST), ("b", *FIRST), ("a", "vt", 2048)))
    assert (a.mean, a.spread, a.questions, a.is_whole) == (0.75, pytest.approx(0.125**0.5), 4, True)
    assert (b.mean, b.questions, b.errors, b.missing, b.is_whole) == (0.125, 3, 1, 0, False)
    assert (empty.mean, empty.spread, empty.missing) == (None, None, 4)
    mean, spread = differences(RUN, by_seed)[FIRST]
    assert mean == -0.625 and spread == pytest.approx(0.5 * 0.75 * 2**0.5)
    assert differences(replace(RUN, targets={"a": RUN.targets["a"]}), by_seed) == {}


def test_depths_have_their_own_means():
    found = {(c.target, c.depth): (c.questions, c.score) for c in depth_cells(scored())}
    assert found == {("a", 0.0): (2, 1.0), ("a", 1.0): (2, 0.5), ("b", 0.0): (2, 0.25), ("b", 1.0): (1, 0.0)}


def test_the_order_of_answers_changes_no_digit():
    keys = [Key("a", "vt", 1024, 0, index) for index in range(5)]
    settings = replace(SETTINGS, samples=5)
    records = {key: record(key, score) for key, score in zip(keys, (0.1, 0.7, 1 / 3, 0.9, 0.2), strict=True)}
    backwards = dict(reversed(records.items()))
    five = replace(RUN, settings=settings)
    assert seed_cells(five, records) == seed_cells(five, backwards)


def test_table_has_both_targets_and_their_difference():
    rows = list(table.table_rows(RUN, seed_cells(RUN, scored())))
    assert rows[0] == ["needle_single", "a", "0.750 ± 0.354", "-*"]
    assert rows[1] == ["needle_single", "b", "0.125 ± 0.177*", "-*"]
    assert rows[2] == ["needle_single", "difference", "-0.625 ± 0.530", "-"]
    assert rows[-2:] == [["mean of tasks", "a", "0.750*", "-*"], ["mean of tasks", "b", "0.125*", "-*"]]
    notes = " ".join(table.notes(RUN, seed_cells(RUN, scored())))
    assert "b less a" in notes and "failed (1 in all) or were not asked yet (24)" in notes


def test_table_is_lines_that_no_console_breaks():
    console = Console(file=io.StringIO(), width=20)
    table.print_table(console, RUN, seed_cells(RUN, scored()))
    lines = console.file.getvalue().splitlines()
    assert lines[0].split() == ["task", "target", "1,024", "2,048"]
    assert lines[2].startswith("needle_single  a ")


def test_no_difference_is_a_plain_zero():
    assert table.score_text(-1e-9, None, signed=True) == "+0.000"


def test_reports_come_from_the_records(tmp_path):
    write_reports(tmp_path, RUN, scored())
    rows = list(csv.DictReader((tmp_path / "results.csv").open()))
    assert len(rows) == 2 * 2 * 2 * 2
    expected = {"target": "b", "task": "needle_single", "length": "1024", "seed": "1", "questions": "1", "errors": "1"}
    assert {**expected, "score": "0.000000"} in rows
    assert [row["score"] for row in rows].count("") == 12
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["settings"]["lengths"] == [2048, 1024]
    assert [error["error"] for error in results["errors"]] == ["lost"]
    assert {(d["task"], d["mean"]) for d in results["differences"]} == {("needle_single", -0.625)} | {
        (task, None) for task in SETTINGS.tasks
    }
    for name in ("heatmap.png", "tasks.png"):
        width, height = Image.open(tmp_path / name).size
        assert width > 600 and height > 250


def test_names_are_text_and_only_answered_tasks_head_the_heat_map(tmp_path, monkeypatch):
    titles = []
    draw = heatmap.draw
    monkeypatch.setattr(heatmap, "draw", lambda grid, targets: titles.append(grid.title) or draw(grid, targets))
    lost = record(Key("a", "vt", 1024, 0, 0), depth=0.0, error="lost \ud800")
    target = Target(r"$\none$", "http://c", "m")
    write_reports(tmp_path, replace(RUN, targets={**RUN.targets, target.name: target}), {**scored(), lost.key: lost})
    assert "needle_single; 2 seeds" in titles[1] and "vt" not in titles[1]
    assert "lost \ud800" in [error["error"] for error in json.loads((tmp_path / "results.json").read_text())["errors"]]


def test_no_heat_map_without_depths(tmp_path):
    write_reports(tmp_path, RUN, {})
    assert (tmp_path / "tasks.png").exists() and not (tmp_path / "heatmap.png").exists()


def test_progress_counts_tokens_and_scores():
    keys = list(SETTINGS.keys("a"))
    tally = view.Tally(keys, {keys[0]: record(keys[0], 0.5), keys[1]: record(keys[1], error="busy")})
    assert tally.text() == "1 of 16 answered, mean score 0.500"
    assert tally.tokens_left == 7 * 1024 + 8 * 2048 and tally.seconds_left() is None
    tally.add(record(keys[1], 1.0))
    tally.add(record(keys[2], error="busy"))
    assert tally.text() == "2 of 16 answered, mean score 0.750, 1 failed"
    assert tally.tokens_left == 5 * 1024 + 8 * 2048 and tally.seconds_left() > 0


@pytest.mark.parametrize("is_terminal", [False, True])
def test_progress_is_shown(is_terminal):
    console = Console(file=io.StringIO(), width=120, force_terminal=is_terminal, color_system=None)
    keys = list(SETTINGS.keys("a"))
    with view.open_view(console, {"a": view.Tally(keys, {})}) as shown:
        for key in keys:
            shown.add(record(key))
    assert "16 of 16 answered, mean score 1.000" in console.file.getvalue()
