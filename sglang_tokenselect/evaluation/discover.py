# SPDX-License-Identifier: Apache-2.0
"""What a server tells about itself before it is asked anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import httpx

TIMEOUT = 30.0
MODELS_ROUTE = "/v1/models"
FORBIDDEN = (401, 403)
# Older SGLang servers know the second only.
MODEL_ROUTES = ("/model_info", "/get_model_info")
# Options of TokenSelect that change no answer: where it tells what it does, and from where it is told.
WITHOUT_EFFECT = ("publish", "control", "allow_remote", "record")


@dataclass(frozen=True)
class Server:
    """
    Attributes:
        url: without /v1.
        tokenizer: the folder or name that the server loads its own from, else the model's.
        max_length: tokens of prompt and answer that it takes; None if it does not tell.
        facts: of an SGLang server, see Target.server.
    """

    url: str
    model: str
    tokenizer: str
    max_length: int | None
    facts: dict[str, Any]


class Asker:
    """GET requests to one server."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self.url = base_url(url)
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def get(self, path: str) -> dict[str, Any]:
        """The JSON object at this path; empty if the server has none there.

        Raises:
            httpx.HTTPError: no server answered.
            SystemExit: the server tells nobody its models without another key.
        """
        response = httpx.get(self.url + path, headers=self._headers, timeout=TIMEOUT)
        if path == MODELS_ROUTE and response.status_code in FORBIDDEN:
            raise SystemExit(f"--api-key: expected one that {self.url} takes, got HTTP status {response.status_code}")
        try:
            content = response.json() if response.is_success else {}
        except ValueError:
            content = {}
        return content if isinstance(content, dict) else {}


def base_url(url: str) -> str:
    return url.rstrip("/").removesuffix("/v1")


def discover(url: str, api_key: str | None, model: str | None) -> Server:
    """
    Args:
        model: to ask for; None is the first that the server lists.

    Raises:
        SystemExit: no such server, no access, or no model.
    """
    asker = Asker(url, api_key)
    try:
        listed = [entry for entry in asker.get(MODELS_ROUTE).get("data") or () if isinstance(entry, dict)]
        info = next(filter(None, map(asker.get, MODEL_ROUTES)), {})
        facts = _facts(asker.get("/server_info"))
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise SystemExit(f"{url}: expected an OpenAI-compatible server, got {error!r}") from None
    entry = next((entry for entry in listed if model in (None, entry.get("id"))), {})
    name = model or entry.get("id")
    if not name:
        raise SystemExit(f"{url}: expected a model at {asker.url}{MODELS_ROUTE}, got none; name it with --model")
    return Server(
        url=asker.url,
        model=name,
        tokenizer=info.get("tokenizer_path") or info.get("model_path") or entry.get("root") or name,
        max_length=entry.get("max_model_len"),
        facts=facts,
    )


def read_counters(url: str, api_key: str | None) -> dict[str, int]:
    """What a TokenSelect server has attended to so far, over its data-parallel ranks; empty from any other and none."""
    totals: dict[str, int] = {}
    try:
        info = Asker(url, api_key).get("/server_info")
    except httpx.HTTPError:
        return totals
    for state in _states(info):
        for name, count in state.get("counters", {}).items():
            totals[name] = totals.get(name, 0) + count
    return totals


def _facts(info: dict[str, Any]) -> dict[str, Any]:
    """Those that answers depend on. Nothing else is kept: a server's arguments may hold its keys."""
    if "internal_states" not in info:
        return {}
    facts = {"sglang": info.get("version"), "attention_backend": info.get("attention_backend")}
    configs = [state["config"] for state in _states(info) if "config" in state]
    if configs:
        facts["tokenselect"] = {name: value for name, value in configs[0].items() if name not in WITHOUT_EFFECT}
    return facts


def _states(info: dict[str, Any]) -> list[dict[str, Any]]:
    return [state["tokenselect"] for state in info.get("internal_states") or () if "tokenselect" in state]
