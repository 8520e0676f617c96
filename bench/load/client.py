# SPDX-License-Identifier: Apache-2.0
"""SGLang's own serving benchmark as the client: its command line, and its results."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

from bench.load.setups import RANGE_RATIO, Setup

# Chosen of 0 to 399, since cells have few requests: with this one, arrivals at H200.rates come at 0.20, 0.59, 0.93 and
# 1.19 requests/s, prompts have 22.7k to 24.5k tokens and answers 357 to 404, in the mean at each rate.
SEED = 210
CACHED_BY_CHANCE = 8  # prompt tokens of a request; two prompts can begin alike

# Column: the benchmark's name for it, and the factor between their units.
COLUMNS = {
    "seconds": ("duration", 1),
    "itl_p50_ms": ("median_itl_ms", 1),
    "itl_p99_ms": ("p99_itl_ms", 1),
    "itl_mean_ms": ("mean_itl_ms", 1),
    "ttft_p50_s": ("median_ttft_ms", 1e-3),
    "ttft_p99_s": ("p99_ttft_ms", 1e-3),
    "output_tokens_per_s": ("output_throughput", 1),
    "requests_per_s": ("request_throughput", 1),
    "mean_requests": ("concurrency", 1),
}


BENCHMARK = "sglang.benchmark.serving"

# Each cell has a process of its own, which begins with the benchmark imported: that takes many seconds.
_processes = multiprocessing.get_context("forkserver")


def prepare() -> None:
    """Begins to import the benchmark, beside what else there is to do."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    _processes.set_forkserver_preload([BENCHMARK])
    multiprocessing.forkserver.ensure_running()


def run(url: str, model: Path, setup: Setup, rate: float, limit: float) -> dict[str, object]:
    """The columns of one cell.

    Raises:
        RuntimeError: the benchmark failed, measured nothing, or was not done in `limit` seconds and was ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        results, log = Path(folder) / "results.jsonl", Path(folder) / "log"
        process = _processes.Process(target=_benchmark, args=(arguments(url, model, setup, rate, results), log))
        process.start()
        process.join(limit)
        if process.is_alive():
            process.kill()
            process.join()
            raise RuntimeError(f"the benchmark was not done in {limit:g} s")
        if process.exitcode or not results.exists():
            raise RuntimeError(f"the benchmark ended with {process.exitcode}: {log.read_text()[-2000:]}")
        return parse(results.read_text(), setup.num_requests(rate))


def _benchmark(arguments: list[str], log: Path) -> None:
    from sglang.benchmark.serving import cli_main

    with log.open("w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    sys.argv = [BENCHMARK, *arguments]
    cli_main()


def arguments(url: str, model: Path, setup: Setup, rate: float, results: Path) -> list[str]:
    """The same requests and arrivals for every server. Warming up is left to run.py, whose counters it would touch."""
    requests = ("--dataset-name", "random-ids", "--tokenize-prompt", "--seed", str(SEED))
    lengths = ("--random-input-len", str(setup.prompt_tokens), "--random-output-len", str(setup.output_tokens))
    return [
        *("--backend", "sglang", "--base-url", url),
        *("--model", str(model), "--tokenizer", str(model), *requests, *lengths),
        *("--random-range-ratio", str(RANGE_RATIO), "--num-prompts", str(setup.num_requests(rate))),
        *("--request-rate", str(rate), "--warmup-requests", "0", "--disable-tqdm"),
        *("--output-file", str(results), "--output-details", "--cache-report"),
    ]


def parse(text: str, num_requests: int) -> dict[str, object]:
    """From the benchmark's JSONL, which has one line for each run; the last one counts."""
    result = json.loads(text.splitlines()[-1])
    if not result["completed"]:
        raise RuntimeError(f"no request was completed: {next(filter(None, result['errors']), '')[-1000:]}")
    timed = [ttft for ttft, error in zip(result["ttfts"], result["errors"], strict=True) if not error]
    if not all(timed):
        raise RuntimeError("answers without text: the benchmark cannot time them")
    measured = {column: round(result[name] * factor, 4) for column, (name, factor) in COLUMNS.items()}
    return {"requests": num_requests, "completed": result["completed"], **measured, "note": _note(result, num_requests)}


def _note(result: dict, num_requests: int) -> str:
    notes = []
    if result["completed"] < num_requests:
        error = next(filter(None, result["errors"]), "")
        notes.append(f"{num_requests - result['completed']} requests failed: {error.strip()[-200:]}")
    cached = sum(tokens for tokens in result["cached_tokens"] if tokens > CACHED_BY_CHANCE)
    if cached:  # of a request that was retracted, its own tokens
        notes.append(f"{cached} prompt tokens came from the radix cache")
    return "; ".join(" ".join(note.split()) for note in notes)
