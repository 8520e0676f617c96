# SPDX-License-Identifier: Apache-2.0
"""A real server is watched and steered from outside, and requests bring options of their own."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request

import openai
import pytest
import zmq
from models import write_model
from traffic import SPARSE, TOKEN_SERVER, Request, ask, unshared_requests

from sglang_tokenselect.needle import tasks
from sglang_tokenselect.needle_server import needle_server
from sglang_tokenselect.server_process import ServerProcess

DENSE = {"tokenselect": {"dense": True}}
BAD_OPTIONS = {
    "too large a budget": {"budget": 449},
    "an unknown option": {"effort": 1},
    "text": {"dense": "yes"},
    "nested": {"budget": {"of": {"what": 1}}},
    "a list": [1],
}


@pytest.fixture(scope="module")
def endpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sockets")
    return {name: f"ipc://{folder}/{name}" for name in ("publish", "control")}


@pytest.fixture(scope="module")
def server(endpoints):
    flags = [text for name, endpoint in endpoints.items() for text in (f"--tokenselect-{name}", endpoint)]
    with needle_server(False, "--enable-metrics", "--tokenselect-mass-every", "1", *flags) as server:
        yield server


@pytest.fixture(scope="module")
def question():
    context = tasks.make_context(tasks.held_out(3), 2000, count_tokens=lambda text: len(text.split()))
    sample = tasks.questions(context)[0]
    return context.text + sample.question, sample.answers


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "sglang_tokenselect.cli", *arguments], capture_output=True, text=True, timeout=60
    )


def ctl(endpoints, *arguments):
    return command("ctl", "--endpoint", endpoints["control"], *arguments)


def answer(server, question, max_new_tokens=8, **sampling):
    sampling = {"max_new_tokens": max_new_tokens, "temperature": 0.0, "ignore_eos": True, **sampling}
    return server.post("/generate", {"text": question, "sampling_params": sampling})["text"]


def metrics(server):
    """Values by name; of those with a policy label, the policy that is 1."""
    with urllib.request.urlopen(server.url + "/metrics", timeout=30) as response:
        text = response.read().decode()
    [policy] = re.findall(r'^tokenselect_policy\{.*policy="(\w+)".*\} 1\.0$', text, re.MULTILINE)
    values = re.findall(r"^tokenselect_(\w+)\{.*\} (\S+)$", text, re.MULTILINE)
    return {**{name: float(value) for name, value in values}, "policy": policy}


def wait_for(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "not within 10 s"
        time.sleep(0.2)


def test_metrics_appear_beside_sglangs_own(server, question):
    counted = server.counters()["decode_queries"]
    assert tasks.score(answer(server, question[0]), question[1]) == 1.0
    wait_for(lambda: metrics(server)["decode_queries_total"] >= counted + 7)
    shown, counters = metrics(server), server.counters()
    assert shown["votes_total"] == counters["votes"] > 0
    assert shown["tokens_not_read_total"] == counters["cached_tokens"] - counters["attended_tokens"] > 0
    assert (shown["effort_level"], shown["budget_tokens"], shown["policy"]) == (0, 448, "fixed")
    assert 0 < shown["attention_mass"] < 1


def test_the_monitor_shows_the_stream(server, endpoints):
    view = command("monitor", endpoints["publish"], "--once")
    assert view.returncode == 0, view.stderr
    assert "budget 448" in view.stdout and "policy" in view.stdout
    [line] = command("monitor", endpoints["publish"], "--once", "--json").stdout.splitlines()
    assert json.loads(line)["counters"]["votes"] == server.counters()["votes"]


def test_ctl_changes_the_policy(server, endpoints, question):
    """A level far down attends to fewer tokens; a target that no level can hold leads there as well, and rest back."""
    try:
        assert ctl(endpoints, "set", "level=4").returncode == 0
        wait_for(lambda: metrics(server)["budget_tokens"] == 224)
        before = server.counters()
        answer(server, question[0])
        after = server.counters()
        queries = after["decode_queries"] - before["decode_queries"]
        assert after["attended_tokens"] - before["attended_tokens"] == queries * (64 + 224 + 128)
        assert ctl(endpoints, "set", "policy=slo", "itl_target_ms=0.001").returncode == 0
        wait_for(lambda: metrics(server)["effort_level"] == 0 and metrics(server)["policy"] == "slo")
        changes = metrics(server)["level_changes_total"]
        answer(server, question[0], max_new_tokens=120)
        wait_for(lambda: metrics(server)["level_changes_total"] >= changes + 3)  # down to 4 in two steps, and back
        assert metrics(server)["effort_level"] == 0
        assert "itl_target_ms  0.001" in ctl(endpoints, "get").stdout
    finally:
        ctl(endpoints, "set", "policy=fixed", "level=0")


def test_the_guard_raises_the_effort(server, endpoints, question):
    """No share is at least 1 but that of everything, so each level is refused up to the best there is."""
    try:
        ctl(endpoints, "set", "level=2", "min_mass=1.0")
        wait_for(lambda: metrics(server)["effort_level"] == 2)
        answer(server, question[0], max_new_tokens=40)
        wait_for(lambda: metrics(server)["effort_level"] == 0)
    finally:
        ctl(endpoints, "set", "level=0", "min_mass=none")


def test_bad_messages_are_refused_and_serving_goes_on(server, endpoints, question):
    with zmq.Context() as context, context.socket(zmq.REQ) as client:
        client.setsockopt(zmq.RCVTIMEO, 10_000)
        client.connect(endpoints["control"])
        for message in (b"\x80\x04\x95.", b"{}", b'{"command": "set", "options": {"budget": 1}}', b"[" * 10_000):
            client.send(message)
            reply = json.loads(client.recv())
            assert reply["ok"] is False and "expected" in reply["error"]
    refused = ctl(endpoints, "set", "itl_target_ms=-1")
    assert refused.returncode != 0 and "itl_target_ms: expected above 0, got -1" in refused.stderr
    assert tasks.score(answer(server, question[0]), question[1]) == 1.0


def test_options_through_the_openai_api(server, question):
    """Dense is lost beyond the trained length on purpose here: it shows that the request was followed."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")
    long = tasks.make_context(tasks.held_out(4), 7000, count_tokens=lambda text: len(text.split()))
    sample = tasks.questions(long)[0]

    def complete(**extra):
        done = client.completions.create(
            model="default", prompt=long.text + sample.question, max_tokens=8, temperature=0, extra_body=extra
        )
        return tasks.score(done.choices[0].text, sample.answers)

    before = server.counters()["dense_queries"]
    assert complete(custom_params={"tokenselect": {"budget": 400}}) == 1.0
    assert server.counters()["dense_queries"] == before
    assert complete(custom_params=DENSE) == 0.0
    assert server.counters()["dense_queries"] > before
    with pytest.raises(openai.BadRequestError, match=r"budget: expected an integer from 0 to 448 .*got 4096"):
        complete(custom_params={"tokenselect": {"budget": 4096}})


def test_options_through_chat(server, question):
    """The same text is read anew by who asks for something else, and served from the cache to who asks for the same."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")

    def chat(options):
        messages = [{"role": "user", "content": question[0]}]
        extra = {"custom_params": {"tokenselect": options}}
        done = client.chat.completions.create(model="default", messages=messages, max_tokens=4, extra_body=extra)
        details = done.usage.prompt_tokens_details
        return details.cached_tokens if details else 0

    assert chat({"budget": 300}) == chat({"budget": 200}) == 0
    assert chat({"budget": 300}) > 1000
    with pytest.raises(openai.BadRequestError, match="dense: expected true or false, got 1"):
        chat({"dense": 1})


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("llama"), "Llama")


# A request alone is load enough for the cheapest level.
BUSY = ("--tokenselect-policy", "load", "--tokenselect-load-requests", "1")
LOOPS = {"overlap": ("1", ()), "normal, no pickle": ("0", ("--disable-overlap-schedule",))}


@pytest.fixture(scope="module", params=LOOPS.values(), ids=LOOPS.keys())
def sparse_server(request, llama):
    pickles, flags = request.param
    env = {"SGLANG_USE_PICKLE_IPC": pickles}
    with ServerProcess(llama, *TOKEN_SERVER, *SPARSE, *BUSY, *flags, env=env) as server:
        yield server


@pytest.fixture(scope="module")
def dense_answers(llama):
    requests = [request for request in unshared_requests(12) if len(request.input_ids) > 300][:4]
    with ServerProcess(llama, *TOKEN_SERVER, backend="torch_native") as server:
        return requests, [ask(server, request) for request in requests]


def ask_with(server, request, options):
    sampling = {"temperature": 0.0, "max_new_tokens": request.max_new_tokens, "ignore_eos": True}
    sampling["custom_params"] = options
    return server.post("/generate", {"input_ids": request.input_ids, "sampling_params": sampling})["output_ids"]


def test_a_request_for_dense_gets_what_a_dense_server_answers(sparse_server, dense_answers):
    """Whoever comes first, neither reads the keys that the other left of the same prompt in the radix cache."""
    requests, dense = dense_answers
    sparse = [ask(sparse_server, request) for request in requests]
    assert [ask_with(sparse_server, request, DENSE) for request in requests] == dense
    sparse_server.post_text("/flush_cache", {})
    assert [ask_with(sparse_server, request, DENSE) for request in requests] == dense
    assert [ask(sparse_server, request) for request in requests] == sparse
    assert sparse != dense


def test_the_effort_follows_the_load(sparse_server):
    """Once the first step was seen; an own budget is kept."""
    request = Request(list(range(3, 400)), 20)

    def read(answer):
        before = sparse_server.counters()
        answer()
        after = sparse_server.counters()
        return [after[name] - before[name] for name in ("decode_queries", "attended_tokens")]

    queries, attended = read(lambda: ask(sparse_server, request))
    assert (attended - queries * (16 + 24 + 32)) / 24 in (1, 2)
    queries, attended = read(lambda: ask_with(sparse_server, request, {"tokenselect": {"budget": 40}}))
    assert attended == queries * (16 + 40 + 32)
    wait_for(lambda: sparse_server.report()["effort"]["level"] == 0)


@pytest.mark.parametrize("options", BAD_OPTIONS.values(), ids=BAD_OPTIONS.keys())
def test_bad_options_get_a_400_with_the_reason(sparse_server, options):
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask_with(sparse_server, Request([5, 6, 7], 3), {"tokenselect": options})
    assert refused.value.code == 400
    assert "custom_params.tokenselect" in refused.value.read().decode()
    assert len(ask(sparse_server, Request([5, 6, 7], 3))) == 3
