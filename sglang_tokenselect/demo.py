# SPDX-License-Identifier: Apache-2.0
"""The demo: real SGLang answers questions about long texts, with TokenSelect and dense, side by side.

Both servers start at once, since a start uses one core; the questions go to one after the other, so
that the times are those of a server that has the machine to itself.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import openai
from rich.console import Console

from sglang_tokenselect.demo_questions import draw_samples, short_question, token_counter
from sglang_tokenselect.demo_view import View, open_view
from sglang_tokenselect.needle import checkpoint_path, tasks
from sglang_tokenselect.needle_server import needle_server
from sglang_tokenselect.server_process import ServerProcess, allow_loopback

IS_DENSE = {"tokenselect": False, "dense": True}
# Greedy answers are the same on each run of a machine; another machine's rounding may turn a close one.
REQUIRED_SHARE = 0.9
START_TIMEOUT = 420.0


@dataclass(frozen=True)
class DemoOptions:
    """What to ask. `model_path` None is the shipped checkpoint, `json_path` None writes no file."""

    lengths: tuple[int, ...]
    num_questions: int
    seed: int
    json_path: Path | None = None
    model_path: Path | None = None


@dataclass(frozen=True)
class Answer:
    """What one backend said.

    Attributes:
        prompt_tokens: tokens of the prompt, of which `cached_tokens` came from the radix cache.
        seconds: from the request to the whole answer.
        attended: tokens attended per decode step, on average; None for the dense backend (all).
        attended_share: `attended` over the tokens that were cached then.
    """

    text: str
    is_right: bool
    prompt_tokens: int
    cached_tokens: int
    seconds: float
    attended: float | None = None
    attended_share: float | None = None


@dataclass(frozen=True)
class Row:
    """One question and its two answers."""

    length: int
    task: str
    question: str
    expected: tuple[str, ...]
    tokenselect: Answer
    dense: Answer


class Asker:
    """Puts questions to one server through the OpenAI-compatible API."""

    def __init__(self, server: ServerProcess, count_tokens: Callable[[str], int]) -> None:
        self._server = server
        self._count_tokens = count_tokens
        self._client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=600.0)

    def ask(self, sample: tasks.Sample, has_counters: bool) -> Answer:
        before = self._server.counters() if has_counters else {}
        begin = time.monotonic()
        completion = self._client.completions.create(
            model="default",
            prompt=sample.prompt,
            temperature=0,
            max_tokens=self._count_tokens(sample.completion) + 4,
            stop=["\n"],
        )
        seconds = time.monotonic() - begin
        after = self._server.counters() if has_counters else {}
        text, usage = completion.choices[0].text.strip(), completion.usage
        if usage is None:
            raise ValueError("usage: expected it in SGLang's answer, got none")
        details = usage.prompt_tokens_details
        return Answer(
            text=text,
            is_right=tasks.score(text, sample.answers) == 1.0,
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=(details.cached_tokens or 0) if details else 0,
            seconds=seconds,
            **attended_between(before, after),
        )


def attended_between(before: dict[str, int], after: dict[str, int]) -> dict[str, float]:
    """Tokens attended per decode step between two readings of the counters; nothing without a step."""
    steps, attended, cached = (
        after.get(name, 0) - before.get(name, 0) for name in ("decode_queries", "attended_tokens", "cached_tokens")
    )
    return {"attended": attended / steps, "attended_share": attended / cached} if steps else {}


def run_demo(options: DemoOptions) -> int:
    """Asks everything and prints it. Returns 0 if TokenSelect answered, else 1."""
    begin = time.monotonic()
    checkpoint = options.model_path or checkpoint_path()
    if not (checkpoint / "model.safetensors").is_file():
        raise SystemExit(f"checkpoint: expected model.safetensors in {checkpoint}, got no such file")
    console, rows = Console(), []
    servers = {name: needle_server(is_dense, model_path=checkpoint) for name, is_dense in IS_DENSE.items()}
    try:
        with stopped_at_end(servers, console), open_view(console) as view:
            start(servers, view)
            for row in ask_all(servers, options, token_counter(checkpoint), view):
                rows.append(row)
                view.add(row)
    finally:
        if options.json_path:
            options.json_path.write_text(json.dumps([asdict(row) for row in rows], indent=2) + "\n")
    console.print(summary(rows, time.monotonic() - begin), highlight=False, soft_wrap=True)
    return 0 if has_answered(rows) else 1


def ask_all(
    servers: dict[str, ServerProcess], options: DemoOptions, count_tokens: Callable[[str], int], view: View
) -> Iterator[Row]:
    askers = {name: Asker(server, count_tokens) for name, server in servers.items()}
    for length in options.lengths:
        for sample in draw_samples(length, options.num_questions, options.seed, count_tokens):
            answers = {}
            for name, asker in askers.items():
                view.status(f"{name} answers about {length:,} tokens")
                try:
                    answers[name] = asker.ask(sample, has_counters=name == "tokenselect")
                except (openai.OpenAIError, OSError) as error:
                    raise SystemExit(f"{name}: expected an answer, got {error!r}; see its log above") from error
            yield Row(length, sample.task, short_question(sample), sample.answers, **answers)


def start(servers: dict[str, ServerProcess], view: View) -> None:
    """Starts all servers at once and waits until each answers."""
    view.status("SGLang starts, twice: with tokenselect and dense")
    allow_loopback()
    for server in servers.values():
        server.start()
    for name, server in servers.items():
        try:
            server.wait_until_ready(START_TIMEOUT)
        except RuntimeError:
            raise SystemExit(f"{name}: expected a server, got none; the end of its log is above") from None


@contextmanager
def stopped_at_end(servers: dict[str, ServerProcess], console: Console) -> Iterator[None]:
    """Stops the servers however the block ends; if it fails, shows the end of their logs."""
    try:
        yield
    except BaseException:
        for name, server in servers.items():
            console.print(f"\nEnd of the log of {name}, {server.log_path}:", style="bold")
            console.print(server.log_tail(15), markup=False, highlight=False)
        raise
    finally:
        # A second Ctrl-C must not leave a server behind.
        previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
        for server in servers.values():
            server.stop()
        signal.signal(signal.SIGINT, previous)
    for server in servers.values():
        server.log_path.unlink()


def has_answered(rows: list[Row]) -> bool:
    """Whether TokenSelect's answers are right, but for those that rounding may turn."""
    return bool(rows) and sum(row.tokenselect.is_right for row in rows) >= REQUIRED_SHARE * len(rows)


def summary(rows: list[Row], seconds: float) -> str:
    """What was seen, in one sentence."""
    longest = max(row.length for row in rows)
    shares = [row.tokenselect.attended_share for row in rows if row.length == longest]
    share = max((share for share in shares if share is not None), default=1.0)
    right = {name: sum(getattr(row, name).is_right for row in rows) for name in IS_DENSE}
    return (
        f"tokenselect answered {right['tokenselect']} of {len(rows)} questions, attending to {share:.1%} of the "
        f"cached tokens at a length of {longest:,}; dense answered {right['dense']} ({seconds:.0f} s)."
    )
