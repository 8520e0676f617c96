# SPDX-License-Identifier: Apache-2.0
"""Commands to a running server: whatever comes in, the answer is JSON, and only a valid set changes anything."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from snapshots import SNAPSHOT

from sglang_tokenselect.config import TokenSelectConfig
from sglang_tokenselect.control import MAX_ERROR_CHARS, MAX_REQUEST_BYTES, answer
from sglang_tokenselect.controller import RUNTIME_OPTIONS, Controller, Load

CONFIG = TokenSelectConfig(policy="load", itl_target_ms=20.0)


def ask(request: bytes | str | dict, controller: Controller | None = None, snapshot=None) -> dict:
    if isinstance(request, dict):
        request = json.dumps(request)
    if isinstance(request, str):
        request = request.encode()
    return json.loads(answer(request, controller or Controller(CONFIG), snapshot))


def set_options(**options: object) -> dict:
    return {"command": "set", "options": options}


def test_get_tells_the_runtime_options_and_the_latest_snapshot():
    assert ask({"command": "get"}) == {
        "ok": True,
        "config": {name: getattr(CONFIG, name) for name in RUNTIME_OPTIONS},
        "snapshot": None,
    }
    assert ask({"command": "get"}, snapshot=SNAPSHOT)["snapshot"] == SNAPSHOT.to_dict()


def test_set_changes_options_and_tells_all_of_them():
    controller = Controller(CONFIG)
    reply = ask(set_options(policy="slo", itl_target_ms=9.5, min_mass=None), controller)
    assert controller.config == replace(CONFIG, policy="slo", itl_target_ms=9.5)
    assert reply == {"ok": True, "config": {name: getattr(controller.config, name) for name in RUNTIME_OPTIONS}}


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (b"\xff\xfe{}", "request: expected JSON in UTF-8"),
        ("", "request: expected JSON"),
        ("{'command': 'get'}", "request: expected JSON"),
        ('{"command": "get"} {}', "request: expected JSON"),
        ("[" * 60000, "request: expected JSON"),
        ('{"command":' * 5000, "request: expected JSON"),
        (b" " * (MAX_REQUEST_BYTES + 1), f"at most {MAX_REQUEST_BYTES} bytes"),
        ("3", "request: expected an object, got '3'"),
        ('["get"]', "request: expected an object, got 'list of 1'"),
        ("{}", "command: expected one of get, set, got None"),
        ('{"command": ["get"]}', "command: expected one of get, set"),
        ('{"command": "stop"}', "command: expected one of get, set, got 'stop'"),
        ('{"command": "get", "command": "get"}', "request: expected each name once in an object"),
        ('{"command": "set", "options": {"level": 1, "level": 2}}', "request: expected each name once"),
        ('{"command": "get", "options": {}}', "request: expected the fields command with get"),
        ('{"command": "set"}', "request: expected the fields command, options with set"),
        ('{"command": "set", "options": {"level": 1}, "x": 1}', "request: expected the fields command, options"),
        (set_options(), "options: expected an object with at least one option, got 'dict of 0'"),
        ('{"command": "set", "options": [1]}', "options: expected an object"),
        ('{"command": "set", "options": {"itl_target_ms": NaN}}', "request: expected finite numbers, got 'NaN'"),
        ('{"command": "set", "options": {"itl_target_ms": -Infinity}}', "expected finite numbers, got '-Infinity'"),
        ('{"command": "set", "options": {"itl_target_ms": 1e999}}', "itl_target_ms: expected a finite number, got inf"),
        (f'{{"command": "set", "options": {{"itl_target_ms": 1{"0" * 400}}}}}', "integers of up to 18 characters"),
        (set_options(level={"a": 1}), "level: expected a string, a number, true, false or null, got 'dict of 1'"),
        (set_options(level="2"), "level: expected an integer, got '2'"),
        (set_options(level=2.0), "level: expected an integer, got 2.0"),
        (set_options(level=True), "level: expected an integer, got True"),
        (set_options(level=9), "level: expected at most 4, got 9"),
        (set_options(policy="best"), "policy: expected one of fixed, load, slo, got 'best'"),
        (set_options(publish="tcp://*:1"), "option: expected one of policy, level,"),
        (set_options(level=1, budget=5), "option: expected one of policy, level,"),
        (set_options(level=1, itl_target_ms=-1), "itl_target_ms: expected above 0, got -1"),
        (set_options(policy="slo", itl_target_ms=None), "itl_target_ms: expected a number with policy=slo, got None"),
    ],
)
def test_refusals_say_what_was_expected_and_change_nothing(request_, error):
    controller = Controller(CONFIG)
    reply = ask(request_, controller)
    assert reply.keys() == {"ok", "error"} and reply["ok"] is False
    assert error in reply["error"]
    assert controller.config is CONFIG


@pytest.mark.parametrize("text", ["x" * 60000, "\x1b[2J" * 1000, "\ud800" * 1000])
def test_errors_are_short_and_printable(text):
    for request in ({"command": text}, set_options(policy=text), set_options(**{text: 1}), {text: text}):
        error = ask(request)["error"]
        assert len(error) <= MAX_ERROR_CHARS and error.isprintable()


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS, lambda values: st.lists(values) | st.dictionaries(st.text(max_size=8), values), max_leaves=8
)
LIKELY = {
    "policy": st.sampled_from(["fixed", "load", "slo"]),
    "level": st.integers(0, 5),
    "itl_target_ms": st.none() | st.floats(0, 1e9),
    "load_requests": st.integers(0),
    "load_wait_ms": st.floats(0, 1e9),
    "min_budget": st.integers(0, 4096),
    "min_mass": st.none() | st.floats(0, 1.1),
}
SETS = st.fixed_dictionaries({"command": st.just("set"), "options": st.fixed_dictionaries({}, optional=LIKELY)})
REQUESTS = st.fixed_dictionaries(
    {"command": st.sampled_from(["get", "set"]) | VALUES},
    optional={
        "options": st.dictionaries(st.sampled_from((*RUNTIME_OPTIONS, "budget")), SCALARS, max_size=3) | VALUES,
        "more": VALUES,
    },
)


@st.composite
def mutated(draw) -> bytes:
    """A request with some bytes replaced, which often leaves JSON."""
    request = bytearray(json.dumps(draw(SETS | REQUESTS)).encode())
    for _ in range(draw(st.sampled_from([0, 0, 1, 3]))):
        request[draw(st.integers(0, len(request) - 1))] = draw(
            st.sampled_from(b'{}[]",:0189e-.\\ntu\xff') | st.integers(0, 255)
        )
    return bytes(request)


@settings(deadline=None)
@given(st.binary() | VALUES.map(lambda value: json.dumps(value).encode()) | mutated())
def test_any_bytes_are_answered_and_only_a_set_changes_anything(request):
    controller = Controller(CONFIG)
    reply = ask(request, controller, SNAPSHOT)
    assert reply["ok"] is True and reply.keys() <= {"ok", "config", "snapshot"} or reply.keys() == {"ok", "error"}
    if controller.config != CONFIG:
        message = json.loads(request)
        assert reply["ok"] and message["command"] == "set"
        assert controller.config == replace(CONFIG, **message["options"])
        # What was accepted works for the scheduler.
        controller.observe(Load(num_running=8, oldest_wait=0.5, kv_usage=0.5, gap=0.01))
