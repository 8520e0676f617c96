# SPDX-License-Identifier: Apache-2.0
"""The examples as a reader runs them, against a real server: on the GPU, where there is one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from accelerator import DEVICE

from sglang_tokenselect.demo import attended_between
from sglang_tokenselect.needle_server import needle_server

REPO = Path(__file__).parents[2]
WINDOW = 640


@pytest.fixture(scope="module")
def server():
    with needle_server(device=DEVICE) as server:
        yield server


def run(name, *arguments):
    done = subprocess.run(
        [sys.executable, f"examples/{name}.py", *arguments], capture_output=True, text=True, timeout=300, cwd=REPO
    )
    print(done.stdout, done.stderr)
    return done


def test_fork_questions(server):
    """All branches find the document in the radix cache, since the fork has sent it before them."""
    before = server.counters()
    done = run("fork_questions", "--url", server.url)
    assert done.returncode == 0
    header, *lines = done.stdout.splitlines()
    answers = [line for line in lines if "✓" in line]
    assert len(answers) == 8
    for line in answers:
        expected, answer = line[28:].split("✓")
        assert all(name in answer for name in re.findall(r"\w+", expected))
    [share] = re.findall(r"\(([\d.]+)%\) from the radix cache", done.stdout)
    assert float(share) > 99
    read = attended_between(before, server.counters())
    assert read["attended"] == WINDOW and read["attended_share"] < 0.05
    assert f"{WINDOW} tokens, {read['attended_share']:.1%} of those cached" in done.stdout


def turns(done):
    """Context, cached and attended tokens of each turn, and its answer."""
    rows = re.findall(r"^ *\d+ +([\d,]+) +([\d,]+) +([\d,]+) +[\d.]+ s +(.*)$", done.stdout, re.MULTILINE)
    return [(*(int(number.replace(",", "")) for number in row[:3]), row[3]) for row in rows]


def test_agent_loop(server):
    """Every turn finds all that the turns before it read and said in the radix cache."""
    before = server.counters()
    done = run("agent_loop", "--url", server.url)
    assert done.returncode == 0
    rows = turns(done)
    assert len(rows) == 16 and rows[-1][0] > 16_000
    assert len({answer for *_, answer in rows}) == 16
    for (earlier, *_), (context, cached, attended, _) in zip(rows, rows[1:], strict=False):
        assert earlier < cached < context and attended == WINDOW
    assert done.stdout.splitlines()[-1] == "That was the last page."
    assert server.counters()["dense_queries"] == before["dense_queries"]


def test_agent_loop_without_selection_breaks(server):
    """Beyond the trained length, and the example says so."""
    done = run("agent_loop", "--url", server.url, "--dense")
    assert done.returncode == 1
    assert 4 <= len(turns(done)) < 8
    assert all(attended >= context for context, _, attended, _ in turns(done))
    assert done.stdout.splitlines()[-1] == "There is no page with this number."


@pytest.mark.parametrize("name", ["fork_questions", "agent_loop"])
def test_no_server_there_ends_with_one_line(name):
    done = run(name, "--url", "http://127.0.0.1:1")
    assert done.returncode == 1
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("--url: expected a server with --attention-backend tokenselect at http://127.0.0.1:1, got")
