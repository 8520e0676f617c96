# SPDX-License-Identifier: Apache-2.0
"""`sglang-tokenselect eval` against stand-ins for servers: what is asked, when it ends, and how it goes on."""

from __future__ import annotations

import csv
import re
import time

import pytest
from evaluations import evaluate
from openai_server import finds_number, serving

from sglang_tokenselect.evaluation import command, drawer
from sglang_tokenselect.evaluation.settings import Key
from sglang_tokenselect.evaluation.store import read_records, read_run
from sglang_tokenselect.evaluation.tasks.sample import Sample
from sglang_tokenselect.evaluation.tokenizer import load_tokenizer


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
        with pytest.raises(SystemExit, match="cwe cannot be asked in 512 tokens; length: expected at least"):
            evaluate(endpoint, tokenizer, tmp_path / "out", "--tasks", "cwe", "--lengths", "4096")
    assert read_run(tmp_path / "out") == before


def test_a_longer_length_may_have_less_room(tokenizer, tmp_path):
    with serving(finds_number) as endpoint:
        with pytest.raises(SystemExit, match="cwe cannot be asked in 4,096 tokens; length: expected at least 4405 for"):
            evaluate(endpoint, tokenizer, tmp_path / "out", "--tasks", "cwe", "--lengths", "2048,4096,4500")
        assert not endpoint.requests and not (tmp_path / "out").exists()


def test_questions_that_cannot_be_drawn_keep_no_other_from_being_asked(tokenizer, tmp_path, capsys):
    """Their keys have more tokens than those of the first: that needs a length of 433, the fifth 438."""
    options = ("--tasks", "niah_multiquery", "--lengths", "435", "--samples", "6", "--concurrency", "1")
    with serving(lambda prompt: (200, "0")) as endpoint:
        assert evaluate(endpoint, tokenizer, tmp_path / "out", *options) == 1
        records = read_records(tmp_path / "out")
        errors = [record.error for record in records.values() if record.error]
        assert len(records) == 6 and len(endpoint.requests) == 6 - len(errors) > 1
        assert errors and all(error.startswith("not asked; length: expected at least") for error in errors)
        assert f"{len(errors)} questions failed" in capsys.readouterr().out
        assert evaluate(endpoint, tokenizer, tmp_path / "out", *options) == 1
        assert len(endpoint.requests) == 6 - len(errors)


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
    groups = drawer.group_by_text(map(question, texts))
    assert [[sample.prompt[0] for _, sample in group] for group in groups] == [["x", "x"], ["y"], ["z"], ["z"]]


def test_servers_that_cannot_be_asked_are_told(tokenizer, tmp_path):
    with serving(finds_number) as endpoint:
        with pytest.raises(SystemExit, match="--lengths: expected at most the 5,000 that server takes, got 6,000"):
            evaluate(endpoint, tokenizer, tmp_path / "out", "--lengths", "1024,6000")
        with pytest.raises(SystemExit, match="needle_single cannot be asked in 64 tokens; length: expected at least"):
            evaluate(endpoint, tokenizer, tmp_path / "out", "--lengths", "64,1024")
        with pytest.raises(SystemExit, match="Give the folder or name of the model's tokenizer with --tokenizer"):
            evaluate(endpoint, str(tmp_path / "none"), tmp_path / "out")
        assert not endpoint.requests and not (tmp_path / "out").exists()
        endpoint.routes.clear()
        with pytest.raises(SystemExit, match="expected a model at .*/v1/models, got none; name it with --model"):
            evaluate(endpoint, tokenizer, tmp_path / "out")
    with pytest.raises(SystemExit, match="expected an OpenAI-compatible server, got ConnectError"):
        evaluate(endpoint, tokenizer, tmp_path / "out")


@pytest.mark.parametrize(
    ("after", "text"),
    [
        ((4, 4000, 400), "a: a decode step attended to 100 of 1,000 cached tokens, 10.0%"),
        ((4, 4000, 4000), "a: each decode step attended to all cached tokens, 1,000 on average"),
        ((0, 0, 0), None),
        ((-1, -1000, -100), None),
    ],
)
def test_what_decode_attended_to_is_told(after, text):
    names, before = ("decode_queries", "cached_tokens", "attended_tokens"), (1, 1000, 100)
    counters = dict(zip(names, before, strict=True))
    later = {name: counters[name] + more for name, more in zip(names, after, strict=True)}
    assert command.attended_text("a", counters, later) == text
    assert command.attended_text("a", {}, {}) is command.attended_text("a", counters, {}) is None
