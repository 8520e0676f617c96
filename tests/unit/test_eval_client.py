# SPDX-License-Identifier: Apache-2.0
"""What a server is asked, and what it tells about itself."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from openai_server import finds_number, serving

from sglang_tokenselect.evaluation import discover
from sglang_tokenselect.evaluation.client import Client, RequestFailed
from sglang_tokenselect.evaluation.settings import Target
from sglang_tokenselect.evaluation.tasks.sample import Sample

SAMPLE = Sample("What is it?", "\nIt is", ("7",), max_tokens=4, stop=("\n",))


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


def test_what_is_no_answer_is_told():
    with serving(lambda prompt: (200, None)) as endpoint:
        with pytest.raises(RequestFailed, match="text: expected one, got "):
            ask(endpoint)
        endpoint.reply = lambda path, body: (200, b'{"choices":')
        with pytest.raises(RequestFailed, match="JSONDecodeError: Expecting value"):
            ask(endpoint)


def test_a_server_without_access_asks_for_a_key():
    with serving(finds_number) as endpoint:
        endpoint.api_key = "secret"
        assert discover.discover(endpoint.url, "secret", None).model == "small"
        for key in (None, "guess"):
            with pytest.raises(
                SystemExit, match=f"--api-key: expected one that {endpoint.url} takes, got HTTP status 401"
            ):
                discover.discover(endpoint.url, key, "small")


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
