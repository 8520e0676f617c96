# SPDX-License-Identifier: Apache-2.0
"""Real servers of two ranks on the CPU: what they choose and answer is what one rank does."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
from models import write_model
from rank_oracle import compared, server_env
from traffic import (
    RETRACT,
    SPARSE,
    TIGHT,
    TOKEN_SERVER,
    Aborts,
    Request,
    answer_texts,
    counted,
    generate,
    unshared_requests,
)

from sglang_tokenselect.demo_questions import draw_samples, token_counter
from sglang_tokenselect.needle import checkpoint_path, tasks
from sglang_tokenselect.needle_server import needle_server
from sglang_tokenselect.server_process import ServerProcess

TP = ("--tp", "2")
# With random weights a query is hardly like the one before it: near zero some are reused, and some are not.
FLAGS = (*TOKEN_SERVER, *SPARSE, "--chunked-prefill-size", "512", "--tokenselect-theta", "0.1")
REQUESTS = unshared_requests(30)
DENSE = [Request(request.input_ids, request.max_new_tokens, {"dense": True}) for request in REQUESTS]
# Every choice of every layer and step, of decode and of prefill, was compared.
CHOICES = {"batch same", "selection same", "block same", "reuse True same", "reuse False same"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("llama"), "Llama")


@pytest.fixture(scope="module")
def answers_of_one(llama):
    """Of one rank: sparse ones, and dense ones."""
    with ServerProcess(llama, *FLAGS) as server:
        return generate(server, REQUESTS, concurrency=4), generate(server, DENSE, concurrency=4)


def test_two_ranks_choose_and_answer_as_one(llama, answers_of_one, tmp_path):
    """Then as well while the effort is changed from outside, and follows the load."""
    control = f"ipc://{tmp_path}/control"
    flags = (*FLAGS, *TP, "--tokenselect-control", control)
    with ServerProcess(llama, *flags, env=server_env(tmp_path)) as server:
        assert generate(server, REQUESTS, concurrency=8) == answers_of_one[0]
        assert compared(tmp_path) >= CHOICES
        with endless_traffic(server):
            for options in (["level=4"], ["level=1"], ["policy=load"], ["policy=slo", "itl_target_ms=0.001"]):
                assert ctl(control, "set", *options).returncode == 0
                time.sleep(2.0)
    lines = compared(tmp_path)
    assert {line for line in lines if line.endswith("differs")} == set()
    assert {"level 0 same", "level 1 same", "level 4 same"} <= lines


def test_two_ranks_agree_under_retraction_and_aborts(llama, answers_of_one, tmp_path):
    """A retracted request's tokens come back as prefill and may select differently; dense answers must not change."""
    requests = [request for pair in zip(DENSE[:16], REQUESTS[:16], strict=True) for request in pair]
    with ServerProcess(llama, *FLAGS, *TIGHT, *TP, env={**RETRACT, **server_env(tmp_path)}) as server:
        with Aborts(server, REQUESTS[3:7]) as aborts:
            answers = generate(server, requests, concurrency=24)
        log = server.log_path.read_text()
    assert answers[::2] == answers_of_one[1][:16]
    assert aborts.count > 0
    assert re.search(r"#retracted_reqs: [1-9]", log)
    lines = compared(tmp_path)
    assert lines >= CHOICES and not any(line.endswith("differs") for line in lines)


COUNT_TOKENS = token_counter(checkpoint_path())
SAMPLES = [sample for length in (3000, 8192) for sample in draw_samples(length, 8, 105, COUNT_TOKENS)]


def ask(*flags):
    with needle_server(False, *flags) as server:
        return counted(server, lambda: [answer_texts(server, [sample.prompt])[0] for sample in SAMPLES])


@pytest.fixture(scope="module")
def needles_of_one():
    return ask()


def score(answers):
    return sum(tasks.score(text, sample.answers) for text, sample in zip(answers, SAMPLES, strict=True)) / len(SAMPLES)


def test_two_ranks_find_needles_as_one(needles_of_one):
    expected, counters_of_one = needles_of_one
    answers, counters = ask(*TP)
    assert answers == expected
    assert score(answers) >= 0.95
    assert counters["block_votes"] == counters_of_one["block_votes"] > 0
    assert counters["votes"] > 0 and counters["reuses"] > 0


def test_ranks_that_choose_alone_find_needles_too(tmp_path, monkeypatch):
    for name, value in server_env(tmp_path).items():
        monkeypatch.setenv(name, value)
    answers, counters = ask(*TP, "--tokenselect-vote", "local")
    assert score(answers) >= 0.8
    assert counters["votes"] > 0 and counters["block_votes"] > 0
    lines = compared(tmp_path)
    assert {"selection differs", "block differs"} <= lines
    assert not {"batch differs"} & lines


@contextmanager
def endless_traffic(server):
    """Requests one group after the other, until the block ends."""
    done = threading.Event()

    def run():
        requests = [Request(request.input_ids, 40) for request in REQUESTS[-6:]]
        while not done.is_set():
            generate(server, requests, concurrency=3)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def ctl(endpoint, *arguments):
    command = [sys.executable, "-m", "sglang_tokenselect.cli", "ctl", "--endpoint", endpoint, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)
