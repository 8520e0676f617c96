# SPDX-License-Identifier: Apache-2.0
"""The soak of bench/soak, for half a minute: mixed traffic on a real server changes no answer and leaves nothing."""

from __future__ import annotations

import csv
import sys
from dataclasses import replace

import pytest

from bench.soak import run

LOAD = replace(run.LOADS["cpu"], contexts=8, longest=3000, pool=5000, round_seconds=12.0)
ALL_KINDS = ("aborted", "left", "refused")
MOST_GROWTH = 100  # MB in half a minute, from the first quarter to the last


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("soak") / "soak.csv"


@pytest.fixture(scope="module")
def row(out):
    """Of the command, its load aside."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(run.LOADS, "cpu", LOAD)
        patch.setattr(sys, "argv", ["run.py", str(out), "--minutes", "0.5"])
        with pytest.raises(SystemExit) as ended:
            run.main()
    assert not ended.value.code, "the soak found something; see its output"
    with out.open() as file:
        [row] = csv.DictReader(line for line in file if not line.startswith("#"))
    return row


def test_nothing_is_wrong(row):
    assert (row["different"], row["wrong"]) == ("0", "0")
    assert row["right_alone"] == row["asked_alone"]


def test_everything_happened(row):
    assert int(row["retractions"]) > 0 and int(row["answered"]) > 20
    assert all(not row[name].startswith("0 of") for name in ALL_KINDS)
    assert 0 < int(row["most_lent_entries"]) <= LOAD.running


def test_memory_stays(row):
    assert float(row["growth_scheduler_mb"]) < MOST_GROWTH
    assert float(row["growth_http_mb"]) < MOST_GROWTH


def test_the_file_says_how_it_was_measured(row, out):
    text = out.read_text()
    assert "# sglang: " in text and "# command: python -m bench.soak.run" in text and "pool=5000" in text
