# SPDX-License-Identifier: Apache-2.0
"""A streaming client that does little but note when each chunk arrives.

Plain sockets: nothing stands between a chunk and its time stamp but asyncio, and nothing is decoded before all
answers are complete.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np

CHUNK = b"data: {"
LONGEST_LINE = 2**22  # bytes; a chunk repeats all output ids so far
FIRST_ID = 3  # below are a Llama's special tokens
CACHED_BY_CHANCE = 8  # tokens; random prompts of one cell can begin alike

Streamed = tuple[float, list[tuple[float, bytes]]]
"""When a request was sent, and (arrival, line) of each chunk."""


@dataclass(frozen=True)
class Answer:
    """One streamed answer.

    Attributes:
        sent: seconds of perf_counter, just before the request was written.
        arrivals: seconds of perf_counter, one per chunk.
        tokens: generated so far, one per chunk.
    """

    sent: float
    arrivals: tuple[float, ...]
    tokens: tuple[int, ...]

    @property
    def ttft(self) -> float:
        """Seconds to the first chunk."""
        return self.arrivals[0] - self.sent


def prompts(batch: int, context: int, vocab_size: int, repeat: int = 0) -> list[list[int]]:
    """`batch` random prompts of `context` ids: the same ones for every server, others for each `repeat`."""
    rng = np.random.default_rng((batch, context, repeat))
    return rng.integers(FIRST_ID, vocab_size, (batch, context)).tolist()


def ask(url: str, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[Answer]:
    """Sends all prompts at once; greedy, `new_tokens` each.

    Raises:
        RuntimeError: the server refused, answered with an error, or took tokens from its radix cache.
    """
    bodies = [body(ids, new_tokens) for ids in prompts]
    streams = asyncio.run(_stream_all(url, bodies))
    return [parse(sent, chunks, len(ids), new_tokens) for (sent, chunks), ids in zip(streams, prompts, strict=True)]


def parse(sent: float, chunks: Sequence[tuple[float, bytes]], prompt_tokens: int, new_tokens: int) -> Answer:
    """From (arrival, line) pairs as they were read."""
    answer, last = parse_any(sent, chunks, prompt_tokens, new_tokens)
    cached = last["meta_info"]["cached_tokens"]
    if cached > CACHED_BY_CHANCE:
        raise RuntimeError(f"{cached} tokens came from the radix cache")
    return answer


def parse_any(
    sent: float, chunks: Sequence[tuple[float, bytes]], prompt_tokens: int, new_tokens: int
) -> tuple[Answer, dict[str, Any]]:
    """As `parse`, wherever the prompt's keys came from; and the last event, which has all output ids."""
    events = [json.loads(line.removeprefix(b"data: ")) for _, line in chunks]
    for event in events:
        if "error" in event:
            raise RuntimeError(f"the server answered {event['error']}")
    if not events:
        raise RuntimeError("the server's stream ended before its first chunk")
    last = events[-1]["meta_info"]
    found = {name: last[name] for name in ("prompt_tokens", "completion_tokens")}
    if found != {"prompt_tokens": prompt_tokens, "completion_tokens": new_tokens}:
        raise RuntimeError(f"expected {prompt_tokens} tokens in and {new_tokens} out, got {found}")
    tokens = tuple(event["meta_info"]["completion_tokens"] for event in events)
    return Answer(sent, tuple(arrival for arrival, _ in chunks), tokens), events[-1]


def body(ids: Sequence[int], new_tokens: int) -> bytes:
    """Of a request for a greedy answer of exactly so many tokens."""
    sampling = {"temperature": 0.0, "ignore_eos": True, "max_new_tokens": new_tokens}
    return json.dumps({"input_ids": ids, "sampling_params": sampling, "stream": True}).encode()


async def _stream_all(url: str, bodies: Sequence[bytes]) -> list[Streamed]:
    return await asyncio.gather(*(stream(url, body) for body in bodies))


async def stream(url: str, body: bytes) -> Streamed:
    """Sends one request and reads its answer to the end."""
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port, limit=LONGEST_LINE)
    head = f"POST /generate HTTP/1.1\r\nHost: {address.hostname}\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    try:
        sent = time.perf_counter()
        writer.write(head.encode() + body)
        status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError(f"the server answered {(status + await reader.read()).decode(errors='replace')}")
        return sent, await _read_chunks(reader)
    finally:
        writer.close()


async def _read_chunks(reader: asyncio.StreamReader) -> list[tuple[float, bytes]]:
    # Lines suffice: an event is one line, and neither headers nor the frames of HTTP chunks begin as events do.
    chunks = []
    while line := await reader.readline():
        if line.startswith(CHUNK):
            chunks.append((time.perf_counter(), line))
    return chunks
