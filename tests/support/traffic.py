# SPDX-License-Identifier: Apache-2.0
"""Mixed traffic for a server: lengths, shared prefixes, branches, options, concurrency, aborts. Seeded."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, TypeVar

from sglang_tokenselect.needle import tasks
from sglang_tokenselect.server_process import ServerProcess

T = TypeVar("T")

# Flags of servers in these tests: token ids in and out, a tiny model.
_COMMON = (
    *("--max-total-tokens", "40000", "--skip-tokenizer-init", "--grammar-backend", "none", "--random-seed", "0"),
)
TOKEN_SERVER = (*_COMMON, "--device", "cpu", "--dtype", "float32")
GPU_TOKEN_SERVER = (
    *_COMMON,
    *("--device", "cuda", "--dtype", "bfloat16", "--mem-fraction-static", "0.4"),
    *("--cuda-graph-backend-prefill", "disabled", "--cuda-graph-max-bs-decode", "24"),
)


# A window beyond every request of up to 2,000 tokens, in blocks that small chunks cut many times.
WHOLE = ("--tokenselect-budget", "2048", "--tokenselect-block", "32", "--tokenselect-sub-block", "8")
# A small window, whatever the default of min_len.
SPARSE = (
    *("--tokenselect-sink", "16", "--tokenselect-budget", "48", "--tokenselect-local", "32"),
    *("--tokenselect-block", "32", "--tokenselect-sub-block", "8", "--tokenselect-min-len", "0"),
)
# A pool too small for all that run at once; SGLang's own test switch retracts every few steps besides.
TIGHT = ("--chunked-prefill-size", "96", "--max-total-tokens", "2600", "--max-running-requests", "24")
RETRACT = {"SGLANG_TEST_RETRACT": "1"}
COMPACT = ("--tokenselect-positions", "compact")
# Prompts of one HTTP request reach the scheduler together, else each as soon as its text is tokenized.
AT_ONCE = ("--enable-tokenizer-batch-encode",)


@dataclass(frozen=True)
class Request:
    """`options` are its own, as in request_options.py."""

    input_ids: list[int]
    max_new_tokens: int
    options: dict[str, Any] | None = None


def mixed_requests(count: int, *, longest: int, vocab_size: int = 512, seed: int = 0) -> list[Request]:
    """Prompts of 1 to `longest` tokens; two of three continue one of a few shared prefixes."""
    rng = random.Random(seed)
    stems = [_tokens(rng, longest // 2, vocab_size) for _ in range(4)]
    requests = []
    for _ in range(count):
        stem = rng.choice([*stems, *stems, [], [], [], []])
        stem = stem[: rng.randint(0, len(stem))]
        tail = _tokens(rng, rng.choice([1, 2, 7, rng.randint(1, longest // 2)]), vocab_size)
        requests.append(Request(stem + tail, rng.choice([1, 2, rng.randint(3, 24)])))
    return requests


def unshared_requests(count: int) -> list[Request]:
    """No common prefixes: a radix hit inside a block shortens that block, which the spec allows."""
    rng = random.Random(3)
    lengths = [97, 128, 129, *(rng.randint(1, 1200) for _ in range(count - 3))]
    return [Request(_tokens(rng, n, 512), rng.randint(2, 12)) for n in lengths]


def generate(server: ServerProcess, requests: list[Request], *, concurrency: int) -> list[list[int]]:
    """Greedy output ids of each request, with up to `concurrency` in flight."""
    with ThreadPoolExecutor(concurrency) as pool:
        return list(pool.map(lambda request: ask(server, request), requests))


def ask(server: ServerProcess, request: Request, **fields) -> list[int]:
    sampling = {"temperature": 0.0, "max_new_tokens": request.max_new_tokens, "ignore_eos": True}
    payload = {"input_ids": request.input_ids, "sampling_params": with_options(sampling, request.options), **fields}
    return server.post("/generate", payload)["output_ids"]


def with_options(sampling: dict[str, Any], options: dict[str, Any] | None) -> dict[str, Any]:
    return {**sampling, "custom_params": {"tokenselect": options}} if options else sampling


def counted(server: ServerProcess, action: Callable[[], T]) -> tuple[T, dict[str, int]]:
    """What `action` returns, and what the server's counters grew by meanwhile."""
    before = server.counters()
    result = action()
    return result, {name: count - before[name] for name, count in server.counters().items()}


def answer_texts(
    server: ServerProcess, prompts: Sequence[str], *, max_new_tokens: int = 64, options: dict[str, Any] | None = None
) -> list[str]:
    """Answers to questions about needles, asked in one HTTP request."""
    sampling = with_options({"temperature": 0.0, "max_new_tokens": max_new_tokens, "stop": ["\n", "."]}, options)
    answers = server.post("/generate", {"text": list(prompts), "sampling_params": sampling})
    return [answer["text"] for answer in answers]


@dataclass(frozen=True)
class Branch:
    """A question at the end of texts that it shares with others, the one that most share first."""

    texts: tuple[str, ...]
    question: str
    answer: str

    @property
    def prompt(self) -> str:
        return "".join(self.texts) + self.question


def fork(num_tokens: int, seed: int, count_tokens: Callable[[str], int]) -> list[Branch]:
    """12 questions about one context, each for another key."""
    context = tasks.make_context(tasks.held_out(seed), num_tokens, num_needles=12, count_tokens=count_tokens)
    return [_branch((context.text,), sample) for sample in tasks.questions(context)]


def fork_of_forks(num_tokens: int, part_tokens: int, seed: int, count_tokens: Callable[[str], int]) -> list[Branch]:
    """One context that goes on in 3 ways, with 4 questions each: 3 for keys whose numbers each of the parts gives
    differently, and 1 about the context."""
    index = tasks.held_out(seed)
    drawn = tasks.draw_facts(random.Random(index), values_per_key=[1] * 8 + [3] * 3, names_per_chain=[]).needles
    stem = tasks.make_context(
        index, num_tokens, count_tokens=count_tokens, facts=tasks.Facts(needles=drawn[:8], chains=())
    )
    branches = []
    for number in range(3):
        own = tuple(tasks.Needle(needle.key, needle.values[number : number + 1]) for needle in drawn[8:])
        facts = tasks.Facts(needles=own, chains=())
        part = tasks.make_context(index + number + 1, part_tokens, count_tokens=count_tokens, facts=facts)
        samples = [*tasks.questions(part), tasks.ask_number(stem, stem.facts.needles[number])]
        branches += [_branch((stem.text, part.text), sample) for sample in samples]
    return branches


def _branch(texts: tuple[str, ...], sample: tasks.Sample) -> Branch:
    return Branch(texts, sample.question, sample.answers[0])


def answer_alone(server: ServerProcess, branches: Sequence[Branch]) -> list[str]:
    """One after the other, each on an empty radix cache: nothing is shared."""
    answers = []
    for branch in branches:
        server.flush()
        answers += answer_texts(server, [branch.prompt])
    return answers


def answer_at_once(server: ServerProcess, branches: Sequence[Branch]) -> list[str]:
    """In one batch, on a server with AT_ONCE, after what they share was read, each text once."""
    server.flush()
    for prefix in dict.fromkeys(prefix for branch in branches for prefix in accumulate(branch.texts)):
        answer_texts(server, [prefix], max_new_tokens=1)
    return answer_texts(server, [branch.prompt for branch in branches])


class Aborts:
    """Requests that are started and aborted while others run; `count` says how many ended early."""

    def __init__(self, server: ServerProcess, requests: list[Request], pause: float = 0.3) -> None:
        self._server, self._requests, self._pause = server, requests, pause
        self._thread = threading.Thread(target=self._run)
        self.count = 0

    def __enter__(self) -> Aborts:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._thread.join()

    def _run(self) -> None:
        for number, request in enumerate(self._requests):
            rid = f"abort-{number}"
            with ThreadPoolExecutor(1) as pool:
                running = pool.submit(ask, self._server, Request(request.input_ids, 400), rid=rid)
                time.sleep(self._pause)
                self._server.post_text("/abort_request", {"rid": rid})
                self.count += len(running.result()) < 400


def _tokens(rng: random.Random, count: int, vocab_size: int) -> list[int]:
    return [rng.randrange(3, vocab_size) for _ in range(count)]
