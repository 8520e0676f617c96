# SPDX-License-Identifier: Apache-2.0
"""SGLang's own clients against the needle server on a GPU: python bench/serve/clients.py [flags of the server]

Its benchmark, whose requests must all succeed, and its test of repeatability, which counts different answers.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from urllib.parse import urlsplit

from sglang_tokenselect.needle import checkpoint_path
from sglang_tokenselect.needle_server import needle_server

NUM_PROMPTS = 200
BENCHMARK = (
    *("sglang.benchmark.serving", "--backend", "sglang", "--dataset-name", "random-ids"),
    *("--num-prompts", str(NUM_PROMPTS), "--max-concurrency", "16"),
    *("--random-input-len", "12000", "--random-output-len", "64", "--random-range-ratio", "0.1"),
)
REPEATABILITY = ("sglang.test.test_deterministic", "--n-trials", "30", "--max-new-tokens", "32", "--test-mode")


def run(module: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-m", module, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    print(done.stdout, flush=True)
    return done.stdout


def main(flags: Sequence[str]) -> None:
    checkpoint = str(checkpoint_path())
    with needle_server(False, *flags, device="cuda") as server:
        address = urlsplit(server.url)
        where = ("--host", address.hostname, "--port", str(address.port))
        told = run(*BENCHMARK, *where, "--model", checkpoint, "--tokenizer", checkpoint)
        [succeeded] = [line.split()[-1] for line in told.splitlines() if line.startswith("Successful requests:")]
        for mode in ("single", "prefix"):
            run(*REPEATABILITY, mode, *where)
    if int(succeeded) != NUM_PROMPTS:
        raise SystemExit(f"requests that succeeded: expected {NUM_PROMPTS}, got {succeeded}")


if __name__ == "__main__":
    main(sys.argv[1:])
