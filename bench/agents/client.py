# SPDX-License-Identifier: Apache-2.0
"""Sends the requests of one turn, each when its agent has thought, and keeps what comes back."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from bench.serve.client import Answer, Streamed, body, parse_any, stream


@dataclass(frozen=True)
class Ask:
    """What an agent sends.

    Attributes:
        think: seconds to wait before.
        prompt: its ids.
        answer_tokens: how many the server has to generate.
    """

    think: float
    prompt: Sequence[int]
    answer_tokens: int


@dataclass(frozen=True)
class Reply:
    """What an agent gets.

    Attributes:
        answer: when each token came.
        ids: generated.
        prompt_tokens: that were sent.
        cached_tokens: those among them that the radix cache had.
    """

    answer: Answer
    ids: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int


def ask_turn(url: str, asks: Sequence[Ask], limit: float) -> list[Reply | Exception]:
    """The reply to each, or why there is none.

    Args:
        limit: seconds for one answer; the server aborts a request whose client leaves.
    """
    bodies = [body(ask.prompt, ask.answer_tokens) for ask in asks]  # now: encoding would delay who sends meanwhile
    streams = asyncio.run(_stream_all(url, asks, bodies, limit))
    return [_reply(ask, streamed) for ask, streamed in zip(asks, streams, strict=True)]


def _reply(ask: Ask, streamed: Streamed | Exception) -> Reply | Exception:
    if isinstance(streamed, Exception):
        return streamed
    try:
        answer, last = parse_any(*streamed, len(ask.prompt), ask.answer_tokens)
    except RuntimeError as error:
        return error
    return Reply(answer, tuple(last["output_ids"]), len(ask.prompt), last["meta_info"]["cached_tokens"])


async def _stream_all(
    url: str, asks: Sequence[Ask], bodies: Sequence[bytes], limit: float
) -> list[Streamed | Exception]:
    requests = (_think_and_stream(url, ask.think, body, limit) for ask, body in zip(asks, bodies, strict=True))
    return await asyncio.gather(*requests, return_exceptions=True)


async def _think_and_stream(url: str, think: float, body: bytes, limit: float) -> Streamed:
    await asyncio.sleep(think)
    try:
        async with asyncio.timeout(limit):
            return await stream(url, body)
    except TimeoutError:
        raise RuntimeError(f"no answer within {limit:g} s") from None
