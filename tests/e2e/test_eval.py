# SPDX-License-Identifier: Apache-2.0
"""`sglang-tokenselect eval` as a user runs it, against real servers on the shipped checkpoint."""

from __future__ import annotations

import csv
import json
import re
import signal
import subprocess
import sys
import time

import pytest

from sglang_tokenselect.needle_server import needle_server

EVAL = (sys.executable, "-m", "sglang_tokenselect.cli", "eval")
QUESTIONS = ("--tasks", "needle_multi_key,needle_multi_query", "--lengths", "1024,2048", "--seeds", "0,1")
SAMPLES = 6
NUM_QUESTIONS = 2 * 2 * 2 * SAMPLES


@pytest.fixture(scope="module")
def servers():
    """With TokenSelect and dense. They start at once, since a start uses one core."""
    both = needle_server(), needle_server(is_dense=True)
    try:
        for server in both:
            server.start()
        for server in both:
            server.wait_until_ready()
        yield both
    finally:
        for server in both:
            server.stop()
            server.log_path.unlink()


def start(*options):
    # Where tests run in the background the shell lets them ignore SIGINT, and children inherit that.
    return subprocess.Popen(
        [*EVAL, *map(str, options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(process):
    output, _ = process.communicate(timeout=120)
    print(output)
    return process.returncode, output


def rows(folder):
    with (folder / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def num_lines(folder):
    path = folder / "samples.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def wait_for_lines(folder, count, process):
    deadline = time.monotonic() + 60
    while num_lines(folder) < count:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)


def test_an_interrupted_run_goes_on_to_the_same_numbers(servers, tmp_path):
    asked = ("--url", servers[0].url, *QUESTIONS, "--samples", SAMPLES)
    exit_code, output = finish(start(*asked, "--out", tmp_path / "whole"))
    assert exit_code == 0
    assert re.search(r"server: a decode step attended to 640 of [\d,]+ cached tokens, \d+\.\d%", output)
    whole = rows(tmp_path / "whole")
    assert len(whole) == 8 and all(row["questions"] == str(SAMPLES) and row["errors"] == "0" for row in whole)
    assert sum(float(row["score"]) for row in whole) / len(whole) >= 0.95
    for name in ("heatmap.png", "tasks.png", "results.json"):
        assert (tmp_path / "whole" / name).stat().st_size

    stopped = start(*asked, "--out", tmp_path / "parts", "--concurrency", "2")
    wait_for_lines(tmp_path / "parts", 5, stopped)
    stopped.send_signal(signal.SIGINT)
    exit_code, output = finish(stopped)
    done = num_lines(tmp_path / "parts")
    assert exit_code == 130 and 5 <= done < NUM_QUESTIONS
    assert f"Interrupted: {done} of {NUM_QUESTIONS} questions are answered. The same command goes on" in output
    exit_code, output = finish(start("--show", "--out", tmp_path / "parts"))
    assert exit_code == 0 and f"were not asked yet ({NUM_QUESTIONS - done})" in output

    exit_code, output = finish(start(*asked, "--out", tmp_path / "parts"))
    assert exit_code == 0 and num_lines(tmp_path / "parts") == NUM_QUESTIONS
    assert rows(tmp_path / "parts") == whole


def test_two_servers_are_asked_the_same_and_compared(servers, tmp_path):
    """As chats, whose template adds nothing here. With the servers swapped, the folder is refused."""
    sparse, dense = (server.url for server in servers)
    questions = ("--tasks", "needle_single", "--lengths", "1024,2048", "--samples", 3, "--api", "chat")
    names = ("--names", "dense", "tokenselect")
    exit_code, output = finish(start("--compare", dense, sparse, *names, *questions, "--out", tmp_path))
    assert exit_code == 0
    assert [(row["target"], row["length"], row["score"]) for row in rows(tmp_path)] == [
        (target, length, "1.000000") for target in ("dense", "tokenselect") for length in ("1024", "2048")
    ]
    assert "difference: tokenselect less dense." in output
    targets = json.loads((tmp_path / "run.json").read_text())["targets"]
    assert targets["dense"]["server"]["attention_backend"] == "torch_native"
    assert targets["tokenselect"]["server"]["tokenselect"]["budget"] == 448

    exit_code, output = finish(start("--compare", sparse, dense, *names, *questions, "--out", tmp_path))
    assert exit_code == 1 and "server of dense: expected" in output
