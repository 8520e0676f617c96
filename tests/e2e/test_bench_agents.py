# SPDX-License-Identifier: Apache-2.0
"""bench/agents against a real server on the CPU: both workloads, at both efforts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench.agents import setups, table
from bench.agents.run import SEED
from bench.agents.traffic import draw_plan
from bench.result_file import read_csv

ROOT = Path(__file__).parents[2]
LAYERS = setups.SMALL.model["num_hidden_layers"]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    path = tmp_path_factory.mktemp("agents") / "out.csv"
    command = [sys.executable, "bench/agents/run.py", path, "--small", "--servers", setups.GROUPED]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return read_csv(path)


def turns_of(rows, effort, workload):
    return [row for row in rows if (row["effort"], row["workload"]) == (effort, workload)]


@pytest.mark.parametrize("effort", setups.EFFORTS)
@pytest.mark.parametrize("workload", setups.SMALL.workloads, ids=lambda workload: workload.name)
def test_every_turn_is_measured(measured, effort, workload):
    plan = draw_plan(workload.shape, setups.SMALL.model["vocab_size"], SEED)
    first, *rows = turns_of(measured[1], effort, workload.name)
    assert (first["requests"], first["radix_hit_ratio"], first["hit_ratio"]) == ("1", "0.0", "")
    assert [int(row["turn"]) for row in rows] == list(range(1, len(plan.turns) + 1))
    for row, requests in zip(rows, plan.turns, strict=True):
        assert (int(row["requests"]), int(row["failed"])) == (len(requests), 0)
        assert 0 < float(row["itl_p20_ms"]) <= float(row["itl_p50_ms"]) <= float(row["itl_p80_ms"])
        assert float(row["ttft_p50_s"]) > 0 and float(row["output_tokens_per_s"]) > 0
        assert bool(row["decode_tokens_per_s"]) == workload.together
        # Each generated token but the first is a decode step's.
        assert int(row["decode_queries"]) >= sum(request.answer_tokens - 1 for request in requests)


@pytest.mark.parametrize("workload", setups.SMALL.workloads, ids=lambda workload: workload.name)
def test_only_new_tokens_are_computed(measured, workload):
    plan = draw_plan(workload.shape, setups.SMALL.model["vocab_size"], SEED)
    [_, *rows] = turns_of(measured[1], "miss", workload.name)
    for number, (row, requests) in enumerate(zip(rows, plan.turns, strict=True)):
        computed = round((1 - float(row["radix_hit_ratio"])) * int(row["prompt_tokens"]))
        last_tokens = len(requests) if number else 0  # of the answers before, whose keys were never computed
        new_tokens = sum(len(request.new_ids) for request in requests) + last_tokens
        assert new_tokens - len(requests) <= computed <= new_tokens  # one less in a fork


def test_efforts_are_what_they_are_called(measured):
    rows = [row for row in measured[1] if row["hit_ratio"]]
    assert len(rows) == 8
    for row in rows:
        votes, reuses, queries = (int(row[name]) for name in ("votes", "reuses", "decode_queries"))
        assert votes + reuses == LAYERS * queries
        if row["effort"] == "miss":
            assert reuses == 0
        else:
            assert votes == LAYERS * int(row["requests"])  # in the first step of each
    shares = {effort: [row["attended_share"] for row in rows if row["effort"] == effort] for effort in setups.EFFORTS}
    assert [float(share) for share in shares["miss"]] == pytest.approx([float(s) for s in shares["hit"]], abs=0.01)


def test_agents_that_decode_together_share_their_scoring(measured):
    ratios = [float(row["shared_ratio"]) for row in measured[1] if row["workload"] == setups.DOCUMENT and row["votes"]]
    assert len(ratios) == 2 and min(ratios) > 0.5


def test_the_file_says_how_it_was_made_and_makes_a_table(measured):
    about, rows = measured
    assert {"commit", "sglang", "server grouped", "command"} <= set(about)
    lines = table.table(rows).splitlines()
    assert len(lines) == 2 + len(rows) and not any("failed" in line for line in lines)
