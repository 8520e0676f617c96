# SPDX-License-Identifier: Apache-2.0
"""The accuracy benchmark without servers: its variants, its cells, its tables."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

import pytest

from bench.accuracy import table
from bench.accuracy.experiments import BUDGETS, EXPERIMENTS, chosen
from bench.accuracy.results import ALL_TASKS, read_cells
from bench.accuracy.run import measures
from sglang_tokenselect import flags
from sglang_tokenselect.config import TokenSelectConfig
from sglang_tokenselect.needle import checkpoint_path
from sglang_tokenselect.needle_server import TOKENSELECT_FLAGS
from sglang_tokenselect.selectors import SELECTORS

TRAINED_LENGTH = json.loads((checkpoint_path() / "config.json").read_text())["max_position_embeddings"]


@pytest.mark.parametrize("variant", [v for make in EXPERIMENTS.values() for v in make()], ids=lambda v: v.name)
def test_servers_take_their_flags_and_budgets(variant):
    parser = argparse.ArgumentParser()
    flags.add_flags(parser)
    given, _ = parser.parse_known_args([*TOKENSELECT_FLAGS, *variant.flags])
    config = TokenSelectConfig(**flags.given_options(given))
    assert all(budget <= config.largest_budget for budget in variant.budgets)
    longest = replace(config.window, budget=config.largest_budget).dense_len + config.block
    assert longest <= TRAINED_LENGTH


def test_names_are_what_differs():
    for make in EXPERIMENTS.values():
        names = [variant.name for variant in make()]
        assert len(set(names)) == len(names)
    assert {variant.name for variant in EXPERIMENTS["policies"]()} == {*SELECTORS, "dense"}


def test_a_choice_narrows_an_experiment():
    [page] = chosen("policies", ["page"], [8192, 1], 2)
    assert (page.name, page.lengths, page.samples, page.budgets) == ("page", (8192,), 2, BUDGETS)
    assert [v.name for v in chosen("policies", None, [131072], None)] == [*SELECTORS]


def row(variant, task, seed, score, budget="256", length="8192", hit_ratio="0.5"):
    cell = {"variant": variant, "budget": budget, "task": task, "length": length, "seed": seed, "hit_ratio": hit_ratio}
    return {**cell, "questions": "8", "score": str(score)}


def test_cells_are_means_of_seeds_and_tasks_weigh_the_same():
    rows = [
        row("vote", "a", "0", 1.0),
        row("vote", "b", "0", 0.5),
        row("vote", "a", "1", 0.5),
        row("vote", "b", "1", 0),
    ]
    cells = read_cells(rows)
    assert cells["vote", "256", 8192, "a"].mean == 0.75
    assert cells["vote", "256", 8192, "a"].spread == pytest.approx(0.35355, abs=1e-5)
    assert cells["vote", "256", 8192, "a"].questions == 16
    both = cells["vote", "256", 8192, ALL_TASKS]
    assert (both.mean, both.questions) == (0.5, 32)
    assert both.spread == pytest.approx(0.35355, abs=1e-5)
    assert read_cells(rows[:1])["vote", "256", 8192, "a"].spread == 0


def test_cells_in_which_another_did_better_are_named(capsys):
    rows = [row("vote", "a", "0", 0.5), row("page", "a", "0", 0.75), row("mean", "a", "0", 0.25)]
    table.print_better(read_cells([*rows, row("vote", "b", "0", 1.0), row("page", "b", "0", 1.0)]))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert lines[1:] == ["| a | 256 | 8,192 | 0.500 ± 0.000 | page 0.750 ± 0.000 |"]


def test_policies_stand_side_by_side_at_equal_attended_tokens(capsys):
    rows = [row("vote", "a", "0", 1.0), row("window", "a", "0", 0.0), row("dense", "a", "0", 0.9, budget="")]
    table.print_policies(read_cells(rows))
    assert capsys.readouterr().out.splitlines()[-1] == (
        "| 256 (448) | 8,192 | 1.000 ± 0.000 |  |  | 0.000 ± 0.000 | 0.900 ± 0.000 |"
    )


def test_variants_have_their_hit_ratio(capsys):
    rows = [row("theta 0.9", "a", "0", 1.0, budget=""), row("theta 0.9", "b", "0", 0.5, budget="")]
    table.print_variants(read_cells(rows), rows)
    assert capsys.readouterr().out.splitlines()[-1] == (
        "| theta 0.9 | 8,192 | 0.5 | 1.000 ± 0.000 | 0.500 ± 0.000 | 0.750 ± 0.000 |"
    )


def test_what_a_server_counted():
    counts = {"decode_queries": 10, "attended_tokens": 6400, "reuses": 30, "votes": 10}
    assert measures(counts) == {"attended": 640, "hit_ratio": "0.750"}
    assert measures({}) == {"attended": "all", "hit_ratio": ""}
