# SPDX-License-Identifier: Apache-2.0
"""What `sglang-tokenselect eval` asks, and the folder of a run."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from evaluations import RUN, SETTINGS, record

from sglang_tokenselect.evaluation import drawer
from sglang_tokenselect.evaluation.settings import Key, Run, Target
from sglang_tokenselect.evaluation.store import open_store, read_records, read_run, samples_path


@pytest.mark.parametrize(("depths", "grid"), [(1, [0.5] * 4), (2, [0, 1, 0, 1]), (3, [0, 0.5, 1, 0]), (0, [None] * 4)])
def test_depths_are_spread_evenly_and_taken_in_turn(depths, grid):
    assert [replace(SETTINGS, depths=depths).depth(index) for index in range(4)] == grid


def test_questions_come_by_length_and_seed_and_those_that_may_share_texts_first():
    keys = drawer.in_order(SETTINGS.keys("a"))
    assert keys[:4] == [Key("a", task, 1024, 0, index) for task in ("vt", "needle_single") for index in (0, 1)]
    assert [(key.length, key.seed) for key in keys[::4]] == [(1024, 0), (1024, 1), (2048, 0), (2048, 1)]
    assert len(set(keys)) == 16


def test_a_run_can_grow():
    more = replace(SETTINGS, tasks=("cwe",), lengths=(4096,), seeds=(1, 2), samples=3)
    target = Target("c", "http://c", "m", {"x": 1})
    grown = RUN.extended(Run(more, {"c": target, "a": Target("a", "http://moved", "m")}, {}))
    assert grown.settings == replace(
        SETTINGS, tasks=("needle_single", "vt", "cwe"), lengths=(2048, 1024, 4096), seeds=(0, 1, 2), samples=3
    )
    assert list(grown.targets) == ["a", "b", "c"] and grown.targets["a"].url == "http://moved"
    assert Run.from_dict(json.loads(json.dumps(grown.to_dict()))) == grown


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 1}, "samples: expected at least 2, as before, got 1"),
        ({"depths": 3}, "depths: expected 2, as before, got 3"),
        ({"api": "chat"}, "api: expected 'completions'"),
        ({"tokenizer": "other"}, "tokenizer: expected 't'"),
        ({"version": "1"}, "version: expected '0'"),
    ],
)
def test_other_settings_are_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        RUN.extended(Run(replace(SETTINGS, **change), RUN.targets, {}))


@pytest.mark.parametrize("change", [{"model": "n"}, {"extra_body": {"x": 1}}, {"server": {"sglang": "1"}}])
def test_another_server_under_a_known_name_is_refused(change):
    with pytest.raises(ValueError, match=f"{next(iter(change))} of b: expected"):
        RUN.extended(Run(SETTINGS, {"b": replace(RUN.targets["b"], **change)}, {}))


def test_a_half_written_line_is_dropped_and_asked_again(tmp_path):
    keys = list(SETTINGS.keys("a"))
    with open_store(tmp_path, RUN) as (_, store):
        store.add(record(keys[0], error="busy"))
        store.add(record(keys[1]))
        assert store.is_answered(keys[1]) and not store.is_answered(keys[0])
    with samples_path(tmp_path).open("a") as file:
        file.write('{"target": "a", "ta')
    assert list(read_records(tmp_path)) == keys[:2]
    with open_store(tmp_path, RUN) as (again, store):
        assert again == RUN and list(store.records) == keys[:2]
        store.add(record(keys[0], score=0.5))
    assert samples_path(tmp_path).read_text().count("\n") == 3
    found = read_records(tmp_path)
    assert found[keys[0]].score == 0.5 and found[keys[1]] == record(keys[1])
    assert read_run(tmp_path) == RUN


def test_folders_that_cannot_be_used_are_told(tmp_path):
    with open_store(tmp_path / "run", RUN), pytest.raises(SystemExit, match="no other run writes to"):
        open_store(tmp_path / "run", RUN).__enter__()
    with pytest.raises(SystemExit, match="depths: expected 2, as before, got 3. Give the same option, or another fol"):
        open_store(tmp_path / "run", replace(RUN, settings=replace(SETTINGS, depths=3))).__enter__()
    samples_path(tmp_path / "run").write_text("{}\n")
    with pytest.raises(SystemExit, match="line 1: expected an answer"):
        open_store(tmp_path / "run", RUN).__enter__()
    (tmp_path / "run" / "run.json").unlink()
    with pytest.raises(SystemExit, match=r"run\.json beside"):
        open_store(tmp_path / "run", RUN).__enter__()
    with pytest.raises(SystemExit, match="a folder to write to or a place for one"):
        open_store(tmp_path / "run" / "samples.jsonl", RUN).__enter__()
    (tmp_path / "other" / "samples.jsonl").mkdir(parents=True)
    with pytest.raises(SystemExit, match="a folder to write to .* Is a directory"):
        open_store(tmp_path / "other", RUN).__enter__()
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(SystemExit, match="expected what an evaluation wrote"):
        read_run(tmp_path)
