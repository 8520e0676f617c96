# SPDX-License-Identifier: Apache-2.0
"""`sglang-tokenselect eval` without a model: options, folder, numbers, figures, and a stand-in for any server."""

from __future__ import annotations

import asyncio
import csv
import io
import json
import re
import shutil
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
from PIL import Image
from rich.console import Console

from sglang_tokenselect import cli
from sglang_tokenselect.evaluation import command, discover, run, table, view
from sglang_tokenselect.evaluation.client import Client, RequestFailed
from sglang_tokenselect.evaluation.options import named_urls
from sglang_tokenselect.evaluation.report import write_reports
from sglang_tokenselect.evaluation.scores import cells, depth_cells, differences, seed_cells
from sglang_tokenselect.evaluation.settings import Key, Run, Settings, Target
from sglang_tokenselect.evaluation.store import Record, open_store, read_records, read_run, samples_path
from sglang_tokenselect.evaluation.tasks.registry import SUITES, TASKS
from sglang_tokenselect.evaluation.tasks.sample import Sample
from sglang_tokenselect.evaluation.tokenizer import TokenCounter, added_tokens, load_tokenizer
from sglang_tokenselect.needle import checkpoint_path

SETTINGS = Settings(
    version="0",
    tasks=("needle_single", "vt"),
    lengths=(2048, 1024),
    seeds=(0, 1),
    samples=2,
    depths=2,
    api="completions",
    tokenizer="t",
)
RUN = Run(SETTINGS, {"a": Target("a", "http://a", "m"), "b": Target("b", "http://b", "m")}, {})
SAMPLE = Sample("What is it?", "\nIt is", ("7",), max_tokens=4, stop=("\n",), depth=None)


def parse(*argv):
    return cli.build_parser().parse_args(["eval", "--url", "u", "--out", "o", *argv])


def record(key, score=1.0, depth=None, error=None):
    return Record(*key, depth=depth, answers=("7",), score=None if error else score, error=error)


# Options.


def test_suites_and_names_become_names_of_tasks():
    tasks = parse("--tasks", "needle,passkey,needle_single").tasks
    assert tasks == (*(name for name, task in TASKS.items() if task.suite == "needle"), "passkey")
    assert {TASKS[name].suite for name in parse("--tasks", ",".join(SUITES)).tasks} == set(SUITES)


def test_defaults_are_parsed_as_options_are():
    args = parse()
    assert (args.lengths, args.seeds, args.samples) == ((4096, 8192, 16384), (0,), 11)
    assert all(TASKS[name].suite == "ruler" for name in args.tasks)
    assert args.extra_body == {} and args.api == "completions"


@pytest.mark.parametrize(
    ("argv", "expected", "got"),
    [
        (("--tasks", "needle,nothing"), "infinitebench", "'nothing'"),
        (("--tasks", ""), "names of ruler", "''"),
        (("--lengths", "4096,"), "integers from 1 on", "'4096,'"),
        (("--lengths", "0"), "integers from 1 on", "'0'"),
        (("--seeds", "-1"), "integers from 0 on", "'-1'"),
        (("--samples", "0"), "an integer from 1 on", "'0'"),
        (("--depths", "two"), "an integer from 0 on", "'two'"),
        (("--extra-body", "[1]"), "a JSON object", "'[1]'"),
        (("--extra-body", "{"), "a JSON object", "'{'"),
    ],
)
def test_bad_values_are_refused_with_what_was_expected(argv, expected, got, capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse(*argv)
    error = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert expected in error and f"got {got}" in error


@pytest.mark.parametrize("argv", [("--compare", "v", "w"), ("--show",)])
def test_one_server_or_two_or_none(argv):
    with pytest.raises(SystemExit):
        parse(*argv)


def test_names_belong_to_servers():
    def names(*argv):
        return named_urls(cli.build_parser().parse_args(["eval", "--out", "o", *argv]))

    assert names("--url", "u") == {"server": "u"}
    assert names("--compare", "u", "v") == {"first": "u", "second": "v"}
    assert names("--compare", "u", "v", "--names", "x", "y") == {"x": "u", "y": "v"}
    for bad in (("--url", "u", "--names", "x", "y"), ("--compare", "u", "v", "--names", "x", "x")):
        with pytest.raises(SystemExit, match="--names: expected"):
            names(*bad)


# Settings.


@pytest.mark.parametrize(("depths", "grid"), [(1, [0.5] * 4), (2, [0, 1, 0, 1]), (3, [0, 0.5, 1, 0]), (0, [None] * 4)])
def test_depths_are_spread_evenly_and_taken_in_turn(depths, grid):
    assert [replace(SETTINGS, depths=depths).depth(index) for index in range(4)] == grid


def test_questions_come_by_length_and_seed_and_those_that_may_share_texts_first():
    keys = run.in_order(SETTINGS.keys("a"))
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


# The folder.


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
    with pytest.raises(SystemExit, match="a folder or a place for one"):
        open_store(tmp_path / "run" / "samples.jsonl", RUN).__enter__()
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(SystemExit, match="expected what an evaluation wrote"):
        read_run(tmp_path)


# The numbers.

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


def test_no_heat_map_without_depths(tmp_path):
    write_reports(tmp_path, RUN, {})
    assert (tmp_path / "tasks.png").exists() and not (tmp_path / "heatmap.png").exists()


# What is shown meanwhile.


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


# Servers.


class Endpoint:
    """An OpenAI-compatible server whose answers a function of the prompt gives.

    Attributes:
        requests: path and body of each request.
        most_at_once: requests that were under way together.
        routes: JSON objects of GET requests.
    """

    def __init__(self, answer):
        self.answer = answer
        self.requests, self.most_at_once, self._now = [], 0, 0
        self._lock = threading.Lock()
        self.routes = {"/v1/models": {"data": [{"id": "small", "max_model_len": 5000}]}}

    def reply(self, path, body):
        with self._lock:
            self.requests.append((path, body))
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        try:
            is_chat = path.endswith("/chat/completions")
            status, choice = self.answer(body["messages"][0]["content"] if is_chat else body["prompt"])
            if status != 200:
                return status, {"error": {"message": choice}}
            text = {"message": {"role": "assistant", "content": choice}} if is_chat else {"text": choice}
            choices = [{"index": 0, "finish_reason": "stop", "logprobs": None, **text}]
            return 200, {"id": "1", "object": "x", "created": 0, "model": "small", "choices": choices}
        finally:
            with self._lock:
                self._now -= 1


@contextmanager
def serving(answer):
    endpoint = Endpoint(answer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            found = self.path in endpoint.routes
            self._send(200 if found else 404, endpoint.routes.get(self.path, {}))

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._send(*endpoint.reply(self.path, body))

        def _send(self, status, content):
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    endpoint.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield endpoint
    finally:
        server.shutdown()
        server.server_close()


def finds_number(prompt):
    return 200, re.search(r"\d{6}", prompt)[0]


def ask(endpoint, api="completions", extra_body=None):
    async def once():
        client = Client(Target("a", endpoint.url, "small", extra_body or {}), api, None, timeout=10)
        try:
            return await client.ask(SAMPLE)
        finally:
            await client.close()

    return asyncio.run(once())


def test_completions_get_the_beginning_of_the_answer():
    with serving(lambda prompt: (200, " 7")) as endpoint:
        assert ask(endpoint, extra_body={"custom_params": {"x": 1}}).prediction == " 7"
    [(path, body)] = endpoint.requests
    assert path == "/v1/completions" and body == {
        **{"model": "small", "prompt": "What is it?\nIt is", "temperature": 0, "max_tokens": 4, "stop": ["\n"]},
        "custom_params": {"x": 1},
    }


def test_chat_gets_it_as_the_end_of_its_message():
    with serving(lambda prompt: (200, None)) as endpoint:
        assert ask(endpoint, "chat").prediction == ""
    [(path, body)] = endpoint.requests
    assert path == "/v1/chat/completions"
    assert body["messages"] == [{"role": "user", "content": "What is it?\nIt is"}]


def test_a_server_that_is_busy_once_is_asked_again():
    answers = iter([(503, "busy"), (200, "7")])
    with serving(lambda prompt: next(answers)) as endpoint:
        assert ask(endpoint).prediction == "7"
    assert len(endpoint.requests) == 2


def test_refusals_and_broken_answers_are_no_answers(monkeypatch):
    with serving(lambda prompt: (400, "too long")) as endpoint, pytest.raises(RequestFailed, match="too long"):
        ask(endpoint)
    broken = {"finish_reason": "abort", "text": "7", "message": None}
    for choices, reason in (([], "choices: expected one"), ([SimpleNamespace(**broken)], "finish_reason: expected")):
        monkeypatch.setattr(Client, "_send", lambda *_, c=choices: asyncio.sleep(0, SimpleNamespace(choices=c)))
        with pytest.raises(RequestFailed, match=reason):
            ask(endpoint)


@pytest.fixture
def tokenizer(tmp_path):
    """A folder that has nothing but the tokenizer."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    shutil.copy(checkpoint_path() / "tokenizer.json", folder)
    return str(folder)


def evaluate(endpoint, tokenizer, out, *argv):
    options = ("--tasks", "needle_single", "--lengths", "512,1024", "--samples", "3", "--tokenizer", tokenizer)
    args = cli.build_parser().parse_args(["eval", "--url", endpoint.url, *options, "--out", str(out), *argv])
    return args.run(args)


def test_everything_is_asked_once_and_scored(tokenizer, tmp_path, capsys):
    with serving(finds_number) as endpoint:
        assert evaluate(endpoint, tokenizer, tmp_path / "out") == 0
        assert len(endpoint.requests) == 6
        assert evaluate(endpoint, tokenizer, tmp_path / "out") == 0
        assert len(endpoint.requests) == 6
        assert evaluate(endpoint, tokenizer, tmp_path / "out", "--seeds", "1") == 0
        assert len(endpoint.requests) == 12
    output = capsys.readouterr().out
    assert "server: 6 of 6 answered, mean score 1.000" in output
    assert re.search(r"needle_single +server +1\.000 ± 0\.000 +1\.000 ± 0\.000", output)
    records = read_records(tmp_path / "out")
    assert sorted({record.depth for record in records.values()}) == [0.0, 0.5, 1.0]
    count = load_tokenizer(tokenizer, "completions")
    for _, body in endpoint.requests:
        tokens = count(body["prompt"]) + body["max_tokens"]
        assert any(0.9 * length < tokens <= length for length in (512, 1024))
    for name in ("results.json", "results.csv", "heatmap.png", "tasks.png"):
        assert (tmp_path / "out" / name).stat().st_size


def test_servers_may_be_asked_one_after_the_other(tokenizer, tmp_path, capsys):
    """As where both do not fit on one machine."""
    failing = iter([True])
    with (
        serving(lambda prompt: (400, "no") if next(failing, False) else finds_number(prompt)) as right,
        serving(lambda prompt: (200, "0")) as wrong,
    ):
        assert evaluate(right, tokenizer, tmp_path / "out", "--names", "right") == 1
        assert evaluate(wrong, tokenizer, tmp_path / "out", "--names", "wrong") == 0
    assert len(right.requests) == len(wrong.requests) == 6
    assert re.search(r"needle_single +difference +-1\.000 +-1\.000", capsys.readouterr().out)


def test_what_is_added_must_fit_what_is_there(tokenizer, tmp_path):
    with serving(finds_number) as endpoint:
        assert evaluate(endpoint, tokenizer, tmp_path / "out") == 0
        before = read_run(tmp_path / "out")
        with pytest.raises(SystemExit, match="cwe does not fit in 512 tokens; length: expected at least"):
            evaluate(endpoint, tokenizer, tmp_path / "out", "--tasks", "cwe", "--lengths", "4096")
    assert read_run(tmp_path / "out") == before


def test_failed_questions_are_no_wrong_ones_and_are_asked_again(tokenizer, tmp_path, capsys):
    failing = iter([True, False, True])
    with serving(lambda prompt: (400, "no") if next(failing, False) else finds_number(prompt)) as endpoint:
        assert evaluate(endpoint, tokenizer, tmp_path / "out") == 1
        assert "2 questions failed; the same command asks them again" in capsys.readouterr().out
        rows = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
        assert sum(int(row["errors"]) for row in rows) == 2
        assert all(float(row["score"]) == 1.0 for row in rows if row["score"])
        assert evaluate(endpoint, tokenizer, tmp_path / "out") == 0
        assert len(endpoint.requests) == 8
        assert evaluate(endpoint, tokenizer, tmp_path / "whole") == 0
    whole, resumed = ((tmp_path / name / "results.csv").read_text() for name in ("whole", "out"))
    assert whole == resumed


def test_a_server_that_only_fails_ends_the_run_with_its_reason(tokenizer, tmp_path, capsys):
    with serving(lambda prompt: (400, "out of order")) as endpoint:
        options = ("--samples", "40", "--concurrency", "2")
        assert evaluate(endpoint, tokenizer, tmp_path / "out", *options) == 1
    assert re.search(r"Stopped: server: 6 requests in a row failed, .*out of order", capsys.readouterr().out)
    assert len(endpoint.requests) < 12
    assert all("out of order" in record.error for record in read_records(tmp_path / "out").values())


def test_failures_with_answers_between_them_do_not_end_the_run(tokenizer, tmp_path, capsys):
    failing = iter([True, True, True, False] * 5)
    with serving(lambda prompt: (400, "no") if next(failing) else finds_number(prompt)) as endpoint:
        assert evaluate(endpoint, tokenizer, tmp_path / "out", "--samples", "10", "--concurrency", "1") == 1
    output = capsys.readouterr().out
    assert len(endpoint.requests) == 20 and "Stopped" not in output and "15 questions failed" in output


def test_requests_at_once_are_bounded_and_a_text_is_read_by_one_first(tokenizer, tmp_path):
    done = []

    def slowly(prompt):
        done.append((prompt, time.monotonic()))
        time.sleep(0.4)
        return 200, "0"

    with serving(slowly) as endpoint:
        options = ("--tasks", "needle_multi_value,needle_multi_query", "--lengths", "2048", "--samples", "2")
        assert evaluate(endpoint, tokenizer, tmp_path / "out", *options, "--concurrency", "2") == 0
    assert endpoint.most_at_once == 2
    begins = sorted(begin for _, begin in done)
    assert begins[1] - begins[0] > 0.35 > begins[2] - begins[1]


def test_texts_in_common_make_a_group():
    def question(text):
        return Key("a", "vt", 1, 0, 0), Sample(text, "", ("7",), 1)

    texts = ["x" * 90 + "one?", "x" * 90 + "two?", "y" * 90 + "one?", "z" * 40 + "x" * 50, "z" * 40 + "y" * 50]
    groups = run.group_by_text(map(question, texts))
    assert [[sample.prompt[0] for _, sample in group] for group in groups] == [["x", "x"], ["y"], ["z"], ["z"]]


def test_servers_that_cannot_be_asked_are_told(tokenizer, tmp_path):
    with serving(finds_number) as endpoint:
        with pytest.raises(SystemExit, match="--lengths: expected at most the 5,000 that server takes, got 6,000"):
            evaluate(endpoint, tokenizer, tmp_path / "out", "--lengths", "1024,6000")
        with pytest.raises(SystemExit, match="needle_single does not fit in 64 tokens; length: expected at least"):
            evaluate(endpoint, tokenizer, tmp_path / "out", "--lengths", "64,1024")
        with pytest.raises(SystemExit, match="Give the folder or name of the model's tokenizer with --tokenizer"):
            evaluate(endpoint, str(tmp_path / "none"), tmp_path / "out")
        assert not endpoint.requests and not (tmp_path / "out").exists()
        endpoint.routes.clear()
        with pytest.raises(SystemExit, match="expected a model at .*/v1/models, got none; name it with --model"):
            evaluate(endpoint, tokenizer, tmp_path / "out")
    with pytest.raises(SystemExit, match="expected an OpenAI-compatible server, got ConnectError"):
        evaluate(endpoint, tokenizer, tmp_path / "out")


def test_an_sglang_server_tells_its_tokenizer_and_what_its_answers_depend_on():
    state = {"tokenselect": {"config": {"budget": 7, "publish": "tcp://x"}, "counters": {"attended_tokens": 5}}}
    info = {"version": "0.5", "attention_backend": "tokenselect", "api_key": "secret", "internal_states": [state] * 2}
    with serving(finds_number) as endpoint:
        assert discover.discover(f"{endpoint.url}/v1/", None, None) == discover.Server(
            endpoint.url, "small", tokenizer="small", max_length=5000, facts={}
        )
        endpoint.routes |= {"/get_model_info": {"tokenizer_path": "/models/t"}, "/server_info": info}
        server = discover.discover(endpoint.url, None, "mine")
        assert (server.model, server.tokenizer) == ("mine", "/models/t")
        assert server.facts == {"sglang": "0.5", "attention_backend": "tokenselect", "tokenselect": {"budget": 7}}
        assert discover.read_counters(endpoint.url, None) == {"attended_tokens": 10}
    assert discover.read_counters(endpoint.url, None) == {}


def test_both_servers_must_have_one_tokenizer():
    servers = {name: discover.Server("u", "m", name, None, {}) for name in "ab"}
    with pytest.raises(SystemExit, match="--tokenizer: expected one that serves both, got none, and a and b by d"):
        command.common_tokenizer(servers)


@pytest.mark.parametrize("task", ["needle_multi_value", "niah_single_2", "kv_retrieval", "cwe"])
def test_what_the_server_adds_is_left_room_for(task):
    """And changes nothing else: below a length of 4,096 cwe has other lists."""
    words = SimpleNamespace(encode=lambda text, add_special_tokens: text.split())
    length, texts = 4096, {}
    for added in (0, 100):
        drawer = run.Drawer(SETTINGS, TokenCounter(words, added))
        sample = drawer.draw(Key("", task, length, 0, 0))
        text = sample.prompt + sample.answer_prefix
        assert 0.95 * length < len(text.split()) + sample.max_tokens + added <= length
        texts[added] = text
    if task == "cwe":
        most_common = [max(Counter(re.findall(r"[a-z]+", text)).values()) for text in texts.values()]
        assert min(most_common) >= 30


def test_tokens_that_the_server_adds_are_told_by_the_tokenizer(tokenizer):
    assert load_tokenizer(tokenizer, "completions").added == 0
    assert load_tokenizer(str(checkpoint_path()), "chat").added == 0
    template = SimpleNamespace(
        chat_template="yes",
        encode=lambda text, add_special_tokens: [0] * (len(text) + add_special_tokens),
        apply_chat_template=lambda messages, **_: f"<user>{messages[0]['content']}</user>",
    )
    assert added_tokens(template, "chat") == len("<user></user>")
    assert added_tokens(template, "completions") == 1
