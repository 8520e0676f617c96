# SPDX-License-Identifier: Apache-2.0
"""Whatever a request asks for under custom_params, and whatever comes to the control socket, is answered or refused.

One server with the needle checkpoint, so that it can be seen to answer rightly in between.
"""

from __future__ import annotations

import json
import socket
from urllib.parse import urlsplit

import pytest
import schemathesis
import zmq
from http_options import ROUTES, is_json, post
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from schemathesis.core import NOT_SET

from sglang_tokenselect.needle import tasks
from sglang_tokenselect.needle_server import needle_server
from sglang_tokenselect.request_options import KEY
from sglang_tokenselect.server_process import free_port

LARGEST = 448  # the server's budget
CONTEXT = tasks.make_context(tasks.held_out(3), 1200, count_tokens=lambda text: len(text.split()))
QUESTION = tasks.questions(CONTEXT)[0]
FUZZ = settings(
    max_examples=100, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module")
def control():
    return f"tcp://127.0.0.1:{free_port()}"


@pytest.fixture(scope="module")
def server(control):
    with needle_server(False, "--tokenselect-control", control) as server:
        yield server
        assert "Traceback" not in server.log_path.read_text()


@pytest.fixture(autouse=True)
def still_right(server):
    yield
    sampling = {"max_new_tokens": 8, "temperature": 0.0}
    answer = server.post("/generate", {"text": QUESTION.prompt, "sampling_params": sampling})["text"]
    assert tasks.score(answer, QUESTION.answers) == 1.0, answer


texts = st.text(st.characters(), max_size=20)  # lone surrogates, too
scalars = st.none() | st.booleans() | st.integers() | st.integers(min_value=2**62) | st.floats() | texts
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4), max_leaves=12
)
options = st.one_of(
    values,
    st.fixed_dictionaries({}, optional={"budget": st.integers(-2, LARGEST + 2) | values, "dense": values}),
    st.fixed_dictionaries({}, optional={"budget": st.integers(0, LARGEST), "dense": st.just(False)}),
    st.dictionaries(st.sampled_from(["budget", "dense", "Budget", "theta"]) | texts, values, max_size=4),
)


def is_allowed(asked):
    """As the README says, written again."""
    if type(asked) is not dict or not set(asked) <= {"budget", "dense"}:
        return False
    budget, dense = asked.get("budget"), asked.get("dense", False)
    if type(dense) is not bool or (dense and budget is not None):
        return False
    return budget is None or (type(budget) is int and 0 <= budget <= LARGEST)


@pytest.mark.parametrize("route", ROUTES)
@FUZZ
@given(asked=options)
@example(asked={"budget": float("nan")})
@example(asked={"budget": 10**400})
@example(asked={"dense": "\ud800"})
@example(asked={"budget": [[[[[[]]]]]] * 3})
@example(asked={"x" * 100_000: "y" * 100_000})
@example(asked={"budget": LARGEST})
@example(asked={"dense": True})
def test_options_are_followed_or_refused(server, route, asked):
    answer = post(server, route, {KEY: asked})
    expected = 200 if is_allowed(asked) else 400
    assert answer.status_code == expected, answer.text
    if expected == 400:
        assert (f"custom_params.{KEY}" if is_json(asked) else "json_invalid") in answer.text


@pytest.mark.parametrize("route", ROUTES)
@FUZZ
@given(custom_params=values | st.dictionaries(texts, values, max_size=6))
@example(custom_params={f"key {number}": number for number in range(5000)})
@example(custom_params={"__req__": 1})
def test_what_is_not_ours_passes_or_is_refused(server, route, custom_params):
    """Other users' custom_params, and what are none."""
    answer = post(server, route, custom_params)
    assert answer.status_code in (200, 400), answer.text


@pytest.mark.parametrize("route", ROUTES)
def test_nesting_without_end_is_refused(server, route):
    asked: list = []
    for _ in range(500):
        asked = [asked]
    assert post(server, route, {KEY: asked}).status_code == 400


# What a request may ask for, as OpenAPI says it; each body is wrapped before it is sent.
BUDGET = {"type": ["integer", "null"], "minimum": 0, "maximum": LARGEST}
ASKED = {
    "anyOf": [
        {"type": "object", "properties": {"budget": budget, "dense": dense}, "additionalProperties": False}
        for budget, dense in ((BUDGET, {"const": False}), ({"type": "null"}, {"type": "boolean"}))
    ]
}
OPERATION = {
    "post": {
        "requestBody": {"required": True, "content": {"application/json": {"schema": ASKED}}},
        "responses": {"200": {"description": "followed"}, "400": {"description": "refused"}},
    }
}
SCHEMA = {
    "openapi": "3.1.0",
    "info": {"title": KEY, "version": "1"},
    "paths": dict.fromkeys(ROUTES, OPERATION),
}
# The routes are SGLang's, and so are their methods.
contract = schemathesis.openapi.from_dict(
    SCHEMA, config=schemathesis.Config.from_dict({"phases": {"coverage": {"unexpected-methods": []}}})
)


@contract.parametrize()
@FUZZ
def test_the_contract_holds(server, case):
    assume(case.body is not NOT_SET and not isinstance(case.body, bytes))  # else there is nothing to wrap
    assume(not (isinstance(case.body, dict) and type(case.body.get("budget")) is float))  # 1.0 is an integer to OpenAPI
    answer = post(server, case.path, {KEY: case.body})
    case.validate_response(answer)
    assert answer.status_code == (200 if is_allowed(case.body) else 400), answer.text


def ask_control(endpoint, *frames):
    with zmq.Context() as context, context.socket(zmq.REQ) as client:
        client.linger, client.rcvtimeo = 0, 10_000
        client.connect(endpoint)
        client.send_multipart(frames)
        return json.loads(client.recv())


@FUZZ
@given(frames=st.lists(st.binary(max_size=200) | values.map(lambda value: json.dumps(value).encode()), min_size=1))
def test_the_control_socket_refuses_and_lives(server, control, frames):
    reply = ask_control(control, *frames)
    assert reply["ok"] is False and "expected" in reply["error"]


@FUZZ
@given(raw=st.binary(max_size=300))
def test_bytes_that_are_no_zmq_leave_the_control_socket_alive(server, control, raw):
    address = urlsplit(control)
    with socket.create_connection((address.hostname, address.port)) as client:
        client.sendall(raw)
    assert ask_control(control, b'{"command": "get"}')["ok"] is True
