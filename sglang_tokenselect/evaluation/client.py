# SPDX-License-Identifier: Apache-2.0
"""Puts one sample to one server through the OpenAI-compatible API."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import openai

from sglang_tokenselect.evaluation.settings import Api, Target
from sglang_tokenselect.evaluation.tasks.sample import Sample

MAX_RETRIES = 2
# The server gave up the request: what it wrote is no answer, and not a wrong one either.
BROKEN_OFF = ("abort", "content_filter", "error")


class RequestFailed(Exception):
    """The server did not answer; the text says why."""


@dataclass(frozen=True)
class Reply:
    """See Record for the attributes."""

    prediction: str
    finish_reason: str | None
    prompt_tokens: int | None
    cached_tokens: int | None
    completion_tokens: int | None
    seconds: float


class Client:
    """Asks greedily. `timeout` is in seconds, for each of up to three tries."""

    def __init__(self, target: Target, api: Api, api_key: str | None, timeout: float) -> None:
        self._target = target
        self._api = api
        self._client = openai.AsyncOpenAI(
            base_url=f"{target.url}/v1", api_key=api_key or "none", max_retries=MAX_RETRIES, timeout=timeout
        )

    async def ask(self, sample: Sample) -> Reply:
        """
        Raises:
            RequestFailed: no answer after the last try, or a broken one.
        """
        begin = time.monotonic()
        try:
            response = await self._send(sample)
        except (openai.OpenAIError, ValueError) as error:  # ValueError: what says that it is JSON is not
            raise RequestFailed(f"{type(error).__name__}: {error}") from None
        return _reply(response, time.monotonic() - begin)

    async def close(self) -> None:
        await self._client.close()

    async def _send(self, sample: Sample) -> Any:
        text = sample.prompt + sample.answer_prefix
        options: dict[str, Any] = {
            "model": self._target.model,
            "temperature": 0,
            "max_tokens": sample.max_tokens,
            "extra_body": dict(self._target.extra_body),
        }
        if sample.stop:
            options["stop"] = list(sample.stop)
        if self._api == "chat":
            options["messages"] = [{"role": "user", "content": text}]
            return await self._client.chat.completions.create(**options)
        return await self._client.completions.create(prompt=text, **options)


def _reply(response: Any, seconds: float) -> Reply:
    if not getattr(response, "choices", None):
        raise RequestFailed(f"choices: expected one, got {str(response)[:200]!r}")
    [choice, *_] = response.choices
    if choice.finish_reason in BROKEN_OFF:
        raise RequestFailed(f"finish_reason: expected stop or length, got {choice.finish_reason!r}")
    message = getattr(choice, "message", None)
    # A chat model that was still thinking at its last token has said nothing.
    text = (message.content or "") if message else getattr(choice, "text", None)
    if not isinstance(text, str):
        raise RequestFailed(f"text: expected one, got {str(choice)[:200]!r}")
    usage: Mapping[str, Any] = response.usage.model_dump() if response.usage else {}
    return Reply(
        prediction=text,
        finish_reason=choice.finish_reason,
        prompt_tokens=usage.get("prompt_tokens"),
        cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens"),
        completion_tokens=usage.get("completion_tokens"),
        seconds=seconds,
    )
