# SPDX-License-Identifier: Apache-2.0
"""bench/load: the client's command line, its results, the published effort, files and tables. No server here."""

from __future__ import annotations

import json
import multiprocessing
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from snapshots import SNAPSHOT

from bench import result_file
from bench.load import client, results, run, setups, table, trace
from sglang_tokenselect.config import TokenSelectConfig
from sglang_tokenselect.controller import Controller
from sglang_tokenselect.sockets import TelemetryServer

RESULT = {
    "duration": 40.5,
    "completed": 2,
    "median_itl_ms": 8.25,
    "p99_itl_ms": 700.123456,
    "mean_itl_ms": 12.5,
    "median_ttft_ms": 900.0,
    "p99_ttft_ms": 2500.0,
    "output_throughput": 310.5,
    "request_throughput": 0.5,
    "concurrency": 1.25,
    "ttfts": [0.8, 1.0],
    "errors": ["", ""],
    "cached_tokens": [0, 1],
}


def parsed(num_requests=2, **changes):
    return client.parse(json.dumps({**RESULT, **changes}) + "\n", num_requests)


def test_the_client_is_told_all_that_makes_servers_comparable():
    arguments = client.arguments("http://127.0.0.1:8000", Path("/model"), setups.H200, 0.6, Path("/out.jsonl"))
    given = dict(zip(arguments, [*arguments[1:], ""], strict=True))
    expected = {
        "--base-url": "http://127.0.0.1:8000",
        "--tokenizer": "/model",
        "--dataset-name": "random-ids",
        "--random-input-len": "32768",
        "--random-output-len": "512",
        "--random-range-ratio": "0.5",
        "--num-prompts": "18",
        "--request-rate": "0.6",
        "--seed": str(client.SEED),
        "--warmup-requests": "0",
        "--output-file": "/out.jsonl",
    }
    assert {name: given[name] for name in expected} == expected
    assert {"--tokenize-prompt", "--output-details", "--cache-report"} <= set(arguments)


def test_sglang_knows_these_options(monkeypatch):
    from sglang.benchmark import serving

    arguments = client.arguments("http://127.0.0.1:8000", Path("/model"), setups.H200, 0.6, Path("/out.jsonl"))
    parsed = []
    monkeypatch.setattr(serving, "run_benchmark", parsed.append)
    monkeypatch.setattr("sys.argv", ["benchmark", *arguments])
    serving.cli_main()
    [options] = parsed
    assert (options.request_rate, options.tokenize_prompt, options.disable_ignore_eos) == (0.6, True, False)
    assert (options.disable_stream, options.temperature) == (False, 0.0)


def test_results_have_milliseconds_between_tokens_and_seconds_to_the_first():
    assert parsed() == {
        "requests": 2,
        "completed": 2,
        "seconds": 40.5,
        "itl_p50_ms": 8.25,
        "itl_p99_ms": 700.1235,
        "itl_mean_ms": 12.5,
        "ttft_p50_s": 0.9,
        "ttft_p99_s": 2.5,
        "output_tokens_per_s": 310.5,
        "requests_per_s": 0.5,
        "mean_requests": 1.25,
        "note": "",
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"completed": 0, "errors": ["refused", ""]}, "no request was completed: refused"),
        ({"ttfts": [0.8, 0.0]}, "answers without text"),
    ],
    ids=["failed", "no text"],
)
def test_what_was_not_measured_gives_no_number(changes, message):
    with pytest.raises(RuntimeError, match=message):
        parsed(**changes)


def test_a_failed_request_is_noted():
    assert parsed(3, ttfts=[0.8, 1.0, 0.0], errors=["", "", "broken\npipe"])["note"] == "1 requests failed: broken pipe"


def test_tokens_from_the_radix_cache_are_noted():
    assert parsed(cached_tokens=[4000, 8])["note"] == "4000 prompt tokens came from the radix cache"


def sleep(*_: object) -> None:
    time.sleep(60)


def fail(arguments: list[str], log: Path) -> None:
    log.write_text("no server")
    raise SystemExit(3)


def test_a_benchmark_that_takes_too_long_is_ended(monkeypatch):
    monkeypatch.setattr(client, "_processes", multiprocessing.get_context("fork"))
    monkeypatch.setattr(client, "_benchmark", sleep)
    with pytest.raises(RuntimeError, match="the benchmark was not done in 0.2 s"):
        client.run("http://127.0.0.1:8000", Path("/model"), setups.H200, 0.6, limit=0.2)


def test_a_benchmark_that_fails_says_why(monkeypatch):
    monkeypatch.setattr(client, "_processes", multiprocessing.get_context("fork"))
    monkeypatch.setattr(client, "_benchmark", fail)
    with pytest.raises(RuntimeError, match="ended with 3: no server"):
        client.run("http://127.0.0.1:8000", Path("/model"), setups.H200, 0.6, limit=60.0)


def snapshot(when: float, level: int, queries: int):
    counters = {**SNAPSHOT.counters, "decode_queries": queries}
    return replace(SNAPSHOT, time=when, level=level, budget=2048 >> level, counters=counters)


def test_effort_is_the_mean_of_the_decode_queries():
    # 10 queries before the cell, then 20 at level 0, 10 at level 2 and 30 at level 1.
    published = [snapshot(99.0, 0, 5), snapshot(101.0, 2, 30), snapshot(101.5, 1, 40)]
    found = trace.mean_effort(published, begun=10, ended=70)
    assert found == {
        "mean_level": round((10 * 2 + 30) / 60, 3),
        "mean_budget": round((20 * 4 + 10 + 30 * 2) * 512 / 60, 3),
    }


def test_without_decode_queries_or_snapshots_there_is_no_mean():
    assert trace.mean_effort([snapshot(99.0, 0, 5)], begun=5, ended=5) == {}
    assert trace.mean_effort([], begun=5, ended=9) == {}


def test_a_trace_has_what_was_published_and_what_held_before(tmp_path):
    endpoint = f"ipc://{tmp_path}/socket"
    with trace.Trace(endpoint) as received:  # before the server, as in a run
        with closing(TelemetryServer(Controller(TokenSelectConfig(publish=endpoint)))) as server:
            deadline = time.monotonic() + 10.0
            while not received.between(0.0, 1.0):
                assert time.monotonic() < deadline, "nothing was received"
                server.send(snapshot(0.5, 0, 0))
                time.sleep(0.05)
            for when in (1.0, 2.0, 3.0, 4.0):
                server.send(snapshot(when, 1, 0))
            while not received.between(3.5, 5.0)[1:]:
                assert time.monotonic() < deadline, "not all was received"
                time.sleep(0.05)
        found = received.between(2.5, 3.5)
    assert [snapshot.time for snapshot in found] == [2.0, 3.0]
    row = {"time": "-0.500", "level": 1, "budget": 1024, "itl_ms": 9.25, "running": 16, "waiting": 3}
    assert trace.row(found[0], begin=2.5) == row


def test_shares_of_a_cell():
    counted = {"votes": 25, "reuses": 75, "attended_tokens": 300, "cached_tokens": 1200, "decode_queries": 9}
    found = run.shares(counted)
    assert (found["hit_ratio"], found["attended_share"], found["decode_queries"]) == (0.75, 0.25, 9)
    idle = run.shares(dict.fromkeys(counted, 0))
    assert (idle["hit_ratio"], idle["attended_share"]) == ("", "")


def test_servers_differ_in_their_policy_alone():
    flags = {name: setups.server_flags(setups.H200, name, 16, 8.5) for name in setups.SERVERS}
    assert flags == {
        "dense": ("flashinfer", ()),
        "fixed": ("tokenselect", ()),
        "load": ("tokenselect", ("--tokenselect-policy", "load", "--tokenselect-load-requests", "16")),
        "slo": ("tokenselect", ("--tokenselect-policy", "slo", "--tokenselect-itl-target-ms", "8.5")),
    }
    assert "--skip-tokenizer-init" not in setups.H200.flags


def test_options_choose_the_setup():
    def chosen(*arguments):
        return run.setup_of(run.parse_options(["out.csv", *arguments]))

    assert chosen() == setups.H200
    assert chosen("--quick") == setups.QUICK
    assert chosen("--smoke") == setups.SMOKE
    other = chosen("--rates", "0.1", "2", "--duration", "20")
    assert [other.num_requests(rate) for rate in other.rates] == [setups.MIN_REQUESTS, 40]


def test_every_token_is_a_word_of_its_own(tmp_path):
    from transformers import AutoTokenizer

    setups.write_model(setups.SMOKE, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    vocab_size = setups.SMOKE.model["vocab_size"]
    assert (tokenizer.vocab_size, tokenizer.all_special_ids, tokenizer.num_special_tokens_to_add()) == (
        vocab_size,
        [],
        0,
    )
    assert tokenizer.decode([0, 7, vocab_size - 1]) == "t0 t7 t4095"
    assert tokenizer.encode("t0 t7 t4095") == [0, 7, 4095]


def written(path: Path, *cells):
    """A file of run.py. Cells: server, rate, and the row or why there is none."""
    report = run.Report(path, {"gpu": "none"})
    for server, rate, outcome in cells:

        def measure(outcome=outcome):
            if isinstance(outcome, Exception):
                raise outcome
            return outcome, [trace.row(SNAPSHOT, SNAPSHOT.time)]

        report.add({"server": server, "rate": rate}, measure)
    return report


EFFORT = {"mean_level": 1.254, "mean_budget": 1536.0, "hit_ratio": 0.756}


def test_files_are_one_table(tmp_path, capsys):
    first, second = tmp_path / "first.csv", tmp_path / "second.csv"
    report = written(first, ("dense", 0.6, parsed()), ("dense", 1.8, RuntimeError("too\nlate")))
    written(second, ("slo", 1.8, {**parsed(), **EFFORT}), ("slo", 0.6, {**parsed(), **EFFORT}))
    capsys.readouterr()
    about, rows = results.read_results([first, second])
    assert (report.failed, about["gpu"], rows[2]["note"]) == (1, "none", "error: too late")
    assert table.table(rows).splitlines() == [
        "| requests/s | server | ITL P50 / P99, ms | TTFT P50 / P99, s | output tokens/s "
        "| mean level | mean budget | hit ratio |",
        "|---|---|---|---|---|---|---|---|",
        "| 0.6 | dense | 8.2 / 700.1 | 0.90 / 2.50 | 310 |  |  |  |",
        "| 0.6 | slo | 8.2 / 700.1 | 0.90 / 2.50 | 310 | 1.25 | 1536 | 0.76 |",
        "| 1.8 | dense | failed / failed | failed / failed | failed |  |  |  |",
        "| 1.8 | slo | 8.2 / 700.1 | 0.90 / 2.50 | 310 | 1.25 | 1536 | 0.76 |",
    ]


def test_the_trace_has_a_file_of_its_own(tmp_path, capsys):
    written(tmp_path / "out.csv", ("slo", 0.6, parsed()))
    capsys.readouterr()
    _, [row] = result_file.read_csv(tmp_path / "out_trace.csv")
    assert " ".join(row) == "server rate time level budget itl_ms running waiting"
    assert (row["time"], row["budget"]) == ("0.000", "2048")
