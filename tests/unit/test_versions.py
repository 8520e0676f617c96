# SPDX-License-Identifier: Apache-2.0
"""The README names the versions that the tests ran with, and these are the ends of the supported range.

If one of these fails: `make test`, the GPU tests with `--ran gpu`, then `make versions`.
"""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import ran
import versions

from sglang_tokenselect import compat

REPO = Path(__file__).parents[2]
RECORDS = versions.read()
CLEAN = {"passed": 3, "failed": []}


def test_the_readme_has_the_table():
    readme = (REPO / "README.md").read_text()
    assert versions.with_table(readme, versions.table(RECORDS)) == readme


def test_every_kind_of_run_is_recorded():
    assert set(RECORDS) == set(versions.WHAT)


def test_what_ran_is_the_supported_range():
    *minor, end = compat.END_OF_SGLANG
    assert compat.release(RECORDS["smoke"]["sglang"]) == compat.FIRST_SGLANG
    assert compat.release(RECORDS["suite"]["sglang"]) == (*minor, end - 1)
    [pin] = [
        name
        for name in tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["dependencies"]
        if name.startswith("sglang")
    ]
    first, after = (".".join(map(str, bound)) for bound in (compat.FIRST_SGLANG, compat.END_OF_SGLANG))
    assert pin == f"sglang>={first},<{after}"


def test_the_makefile_runs_both_ends():
    makefile = (REPO / "Makefile").read_text()
    assert re.findall(r"^(OLDEST|NEWEST) := (.*)$", makefile, re.MULTILINE) == [
        ("OLDEST", RECORDS["smoke"]["sglang"]),
        ("NEWEST", RECORDS["suite"]["sglang"]),
    ]


def test_gpus_are_served_with_what_ran_on_one(monkeypatch):
    monkeypatch.setattr(compat, "version", RECORDS["gpu"].__getitem__)
    assert compat.untested_on_gpus() is None
    assert "CPU" not in RECORDS["gpu"]["device"]


def test_what_runs_now_is_what_the_table_says():
    """SGLang pins the packages; Python is the machine's."""
    now = ran.versions()
    recorded = [record for record in RECORDS.values() if record["sglang"] == now["sglang"]]
    if not recorded:
        pytest.skip(f"SGLang {now['sglang']} is inside the range: the table has its ends")
    for record in recorded:
        assert {name: record[name] for name in ran.PACKAGES} == {name: now[name] for name in ran.PACKAGES}


def test_a_record_counts_and_names_failures():
    stats = {"passed": [1, 2], "skipped": [3], "error": [SimpleNamespace(nodeid="tests/a.py::b")]}
    record = json.loads(json.dumps(ran.record(stats)))
    assert (record["passed"], record["skipped"], record["deselected"]) == (2, 1, 0)
    assert record["failed"] == ["tests/a.py::b"]
    assert set(ran.PACKAGES) < set(record)


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("other", CLEAN),
        ("suite", {"passed": 0, "failed": []}),
        ("suite", {"passed": 3, "failed": ["tests/unit/test_config.py::test"]}),
    ],
)
def test_a_run_that_failed_makes_no_table(name, record):
    with pytest.raises(SystemExit, match="expected"):
        versions.check(name, record)


def test_the_tables_own_failure_does_not_keep_it_out_of_date():
    versions.check("suite", {**CLEAN, "failed": ["tests/unit/test_versions.py::test_the_readme_has_the_table"]})
    assert versions.with_table("a <!-- versions table -->\nold\n<!-- end of versions table --> b", "new") == (
        "a <!-- versions table -->\nnew\n<!-- end of versions table --> b"
    )
    with pytest.raises(ValueError, match="expected '<!-- versions table -->'"):
        versions.with_table("no marks", "new")
