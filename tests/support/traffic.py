# SPDX-License-Identifier: Apache-2.0
"""Mixed traffic for a server: lengths, shared prefixes, concurrency, aborts. Seeded."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from sglang_tokenselect.server_process import ServerProcess

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


@dataclass(frozen=True)
class Request:
    input_ids: list[int]
    max_new_tokens: int


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
    payload = {"input_ids": request.input_ids, "sampling_params": sampling, **fields}
    return server.post("/generate", payload)["output_ids"]


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
