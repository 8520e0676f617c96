# SPDX-License-Identifier: Apache-2.0
"""A request with `custom_params`, through each of SGLang's routes that take them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx
import orjson

from sglang_tokenselect.server_process import ServerProcess

Body = Callable[[str, Any], dict[str, Any]]


def _generate(prompt: str, custom_params: Any) -> dict[str, Any]:
    return {
        "text": prompt,
        "sampling_params": {"max_new_tokens": 1, "temperature": 0.0, "custom_params": custom_params},
    }


def _complete(prompt: str, custom_params: Any) -> dict[str, Any]:
    return {
        "model": "default",
        "prompt": prompt,
        "max_tokens": 1,
        "temperature": 0.0,
        "custom_params": custom_params,
    }


def _chat(prompt: str, custom_params: Any) -> dict[str, Any]:
    body = _complete(prompt, custom_params)
    return {**body, "messages": [{"role": "user", "content": body.pop("prompt")}]}


def is_json(custom_params: Any) -> bool:
    """For SGLang, which reads with orjson: no NaN, no numbers without end, no halves of a character."""
    try:
        orjson.loads(json.dumps(custom_params))
    except orjson.JSONDecodeError:
        return False
    return True


ROUTES: dict[str, Body] = {"/generate": _generate, "/v1/completions": _complete, "/v1/chat/completions": _chat}


def post(server: ServerProcess, route: str, custom_params: Any) -> httpx.Response:
    """`custom_params` may hold what Python's json writes and no standard allows, such as NaN."""
    content = json.dumps(ROUTES[route]("The grass is green.", custom_params))
    return httpx.post(server.url + route, content=content, headers={"Content-Type": "application/json"}, timeout=60)
