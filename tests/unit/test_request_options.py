# SPDX-License-Identifier: Apache-2.0
"""What a request may ask for, and how it keeps its keys to itself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from sglang_tokenselect import flags
from sglang_tokenselect.config import TokenSelectConfig
from sglang_tokenselect.patches import request_options
from sglang_tokenselect.request_options import RequestOptions, parse_options

CONFIG = TokenSelectConfig(budget=100, max_budget=400, sink=4, local=8, min_len=0)


def parse(options):
    return parse_options({"tokenselect": options}, CONFIG.largest_budget)


@pytest.mark.parametrize("custom_params", [None, {}, {"other": 1}, "text", {"tokenselect": {}}])
def test_who_asks_for_nothing_has_no_options(custom_params):
    assert parse_options(custom_params, 400) is None


def test_options_become_a_window():
    assert parse({"budget": 400}) == RequestOptions(budget=400)
    assert parse({"budget": 0}).window(CONFIG).size == 12
    assert parse({"budget": 400}).window(CONFIG).attended_length(1000) == 412
    assert parse({"dense": True}).window(CONFIG).attended_length(10**9) == 10**9
    assert parse({"dense": False}) is None


REFUSED = {
    "no mapping": (["budget"], r"custom_params\.tokenselect: expected \{\"budget\": TOKENS\} or .*, got \['budget'\]"),
    "none": (None, "got None"),
    "unknown option": ({"budgets": 5}, "got {'budgets': 5}"),
    "too large": ({"budget": 401}, r"budget: expected an integer from 0 to 400 \(--tokenselect-max-budget\), got 401"),
    "negative": ({"budget": -1}, "got -1"),
    "text": ({"budget": "5"}, "got '5'"),
    "a switch": ({"budget": True}, "got True"),
    "a fraction": ({"budget": 5.0}, "got 5.0"),
    "dense as a number": ({"dense": 1}, r"dense: expected true or false, got 1"),
    "both": ({"dense": True, "budget": 5}, "expected a budget or dense, not both"),
    "nested": ({"budget": {"a": {"b": 1}}}, "expected an integer"),
    "long": ({"budget": "5" * 10_000}, "got '5{199}$"),
}


@pytest.mark.parametrize("options, reason", REFUSED.values(), ids=REFUSED.keys())
def test_bad_options_are_refused_with_the_reason(options, reason):
    with pytest.raises(ValueError, match=reason):
        parse(options)


def manager(backend="tokenselect"):
    server_args = SimpleNamespace(attention_backend=backend)
    flags.attach(server_args, CONFIG)
    return SimpleNamespace(server_args=server_args)


def tokenized(custom_params, extra_key=None, session_params=None, **sampling):
    params = SimpleNamespace(custom_params=custom_params, **sampling)
    return SimpleNamespace(sampling_params=params, extra_key=extra_key, session_params=session_params)


def checked(*args, backend="tokenselect", **kwargs):
    request = tokenized(*args, **kwargs)
    request_options._check_options(request, manager(backend), object())
    return request.extra_key


def test_keys_of_other_options_are_kept_apart():
    """Also from those of requests that bring a key of their own for this purpose."""
    keys = [
        checked(None),
        checked({"tokenselect": {"budget": 5}}),
        checked({"tokenselect": {"budget": 50}}),
        checked({"tokenselect": {"dense": True}}),
        checked({"tokenselect": {"dense": True}}, "tenant"),
        checked(None, "tenant"),
    ]
    assert len(set(keys)) == len(keys)
    assert keys[0] is None and keys[-1] == "tenant"
    assert checked({"tokenselect": {"budget": 5}}) == keys[1]


def test_what_would_read_others_keys_is_refused():
    """A forged key, a turn of a session, a beam: whoever came before may have attended to something else."""
    with pytest.raises(
        ValueError, match="extra_key: expected none with '|tokenselect:' in it, got '|tokenselect:dense'"
    ):
        checked(None, "|tokenselect:dense")
    with pytest.raises(ValueError, match="expected none in a session"):
        checked({"tokenselect": {"dense": True}}, session_params={"id": "s"})
    with pytest.raises(ValueError, match="beam_width: expected 1 .*got 2"):
        checked(None, beam_width=2)
    assert checked({"other": 1}, "tenant", session_params={"id": "s"}, beam_width=1) == "tenant"


def test_servers_of_other_backends_are_left_alone():
    assert checked({"tokenselect": "anything"}, backend="flashinfer") is None
    with pytest.raises(ValueError, match="expected"):
        checked({"tokenselect": "anything"})
