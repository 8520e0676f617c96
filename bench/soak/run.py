# SPDX-License-Identifier: Apache-2.0
"""A real server under mixed traffic for long: does it stay right, and does it stay small?

    python -m bench.soak.run soak_cpu.csv --minutes 30
    python -m bench.soak.run soak_h200.csv --minutes 30 --device cuda
    python -m bench.soak.run soak_h200_tp2.csv --minutes 30 --device cuda --tp 2

The shipped needle checkpoint with compact positions, its KV pool so small that requests are retracted. Rounds of
seeded arrivals in an open loop (traffic.py), each until the last answer; the radix cache is emptied after some. In the
end each question that was asked is asked alone, with the radix cache empty, and all answers must be those: as far as
they came, of requests that were aborted or left. One row of figures, and exit status 1 if anything is wrong; README.md
has the columns.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch

from bench.kernels.timing import machine
from bench.result_file import commit, write_csv
from bench.soak import checks
from bench.soak.clients import Clients, Outcome
from bench.soak.memory import MB, Sampler, growth, process_names
from bench.soak.traffic import draw_contexts, draw_round
from sglang_tokenselect.demo_questions import token_counter
from sglang_tokenselect.needle import checkpoint_path
from sglang_tokenselect.needle_server import server_environment, server_flags
from sglang_tokenselect.server_process import ServerProcess

WARM_UP = 1.0  # seconds, so one round
SHOWN = 10  # lines of what is wrong


@dataclass(frozen=True)
class Load:
    """What suits a device.

    Attributes:
        rate: arrivals a second.
        round_seconds: of arrivals in a round.
        contexts: how many.
        longest: tokens of a context.
        pool: tokens of the KV pool.
        running: most requests at once.
    """

    rate: float
    round_seconds: float
    contexts: int
    longest: int
    pool: int
    running: int


LOADS = {
    "cpu": Load(rate=1.5, round_seconds=20.0, contexts=24, longest=6000, pool=9000, running=16),
    "cuda": Load(rate=12.0, round_seconds=20.0, contexts=48, longest=30000, pool=80000, running=48),
}
FLUSHED = 0.4  # of the rounds

# SGLang admits more requests than the pool holds to their end, and its own test switch retracts besides.
# Selections are reused more often than by default, so that one that is another request's would be noticed.
REUSE = ("--tokenselect-theta", "0.3")
RETRACTION = ("--schedule-conservativeness", "0.05")
RETRACTION_ENV = {"SGLANG_TEST_RETRACT": "1", "SGLANG_TEST_RETRACT_INTERVAL": "10"}


@dataclass
class Soak:
    """What came of the rounds so far."""

    outcomes: list[Outcome] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    rounds: int = 0
    flushes: int = 0


def soak_server(load: Load, device: str, tp: int, flags: Sequence[str]) -> ServerProcess:
    return ServerProcess(
        checkpoint_path(),
        *server_flags(is_dense=False, device=device),
        *("--max-total-tokens", str(load.pool), "--max-running-requests", str(load.running)),
        *("--chunked-prefill-size", "1024", "--tp-size", str(tp)),
        *RETRACTION,
        *REUSE,
        *flags,
        env={**server_environment(device), **RETRACTION_ENV},
    )


def run_rounds(server: ServerProcess, load: Load, contexts: Sequence, seconds: float, seed: int) -> Soak:
    rng, soak, clients = random.Random(seed), Soak(), Clients(server)
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        outcomes = clients.run(draw_round(rng, contexts, load.round_seconds, load.rate))
        soak.rounds += 1
        soak.outcomes += outcomes
        soak.wrong += [f"{outcome.request.kind}: {outcome.error}" for outcome in outcomes if outcome.error]
        soak.wrong += checks.idle_faults(server)
        if rng.random() < FLUSHED:
            server.flush()
            soak.flushes += 1
        print(f"round {soak.rounds}: {len(outcomes)} requests, {len(soak.wrong)} wrong, {left:.0f} s left", flush=True)
    return soak


def figures(soak: Soak, alone: checks.Alone, different: Sequence[str], log: str, sampler: Sampler) -> dict[str, object]:
    """The columns of the row that are about the traffic and about memory."""
    kinds = Counter(outcome.request.kind for outcome in soak.outcomes)
    cut = Counter(outcome.request.kind for outcome in soak.outcomes if not outcome.finished and not outcome.error)
    row: dict[str, object] = {
        "rounds": soak.rounds,
        "flushes": soak.flushes,
        "requests": len(soak.outcomes),
        "answered": sum(outcome.finished and outcome.request.kind != "bad" for outcome in soak.outcomes),
        "aborted": f"{cut['abort']} of {kinds['abort']}",
        "left": f"{cut['leave']} of {kinds['leave']}",
        "refused": f"{cut['bad']} of {kinds['bad']}",
        "retractions": checks.count_retracted(log),
        "asked_alone": len(alone.texts),
        "right_alone": alone.right,
        "retracted": sum(outcome.retractions > 0 for outcome in soak.outcomes),
        "different": len(different),
        "wrong": len(soak.wrong),
    }
    samples = sampler.samples
    row["most_lent_entries"] = max(sample.lent_entries for sample in samples)
    for name in process_names(samples):
        first, last = growth(samples, lambda sample, name=name: sample.rss[name] / MB)
        row |= {f"rss_{name}_mb": round(first), f"growth_{name}_mb": round(last - first, 1)}
    first, last = growth(samples, lambda sample: sample.gpu / MB)
    return row | {"gpu_mb": round(first), "growth_gpu_mb": round(last - first, 1)}


def soak(options: argparse.Namespace, load: Load) -> tuple[dict[str, object], list[str]]:
    """The row, and what is wrong."""
    contexts = draw_contexts(load.contexts, load.longest, options.seed, token_counter(checkpoint_path()))
    with soak_server(load, options.device, options.tp, options.flags) as server:
        run_rounds(server, load, contexts, WARM_UP, options.seed + 1)
        with Sampler(server, options.device == "cuda") as sampler:
            done = run_rounds(server, load, contexts, 60 * options.minutes, options.seed)
        asked = [outcome.request.question for outcome in done.outcomes if outcome.request.kind != "bad"]
        print(f"asking {len(set(asked))} questions alone", flush=True)
        begin = time.monotonic()
        alone = checks.ask_alone(Clients(server), asked)
        different = checks.mismatches(done.outcomes, alone)
        log = server.log_path.read_text(errors="replace")
        done.wrong += checks.log_faults(log) + checks.lent_faults(sampler.samples, load.running)
        row = figures(done, alone, different, log, sampler)
        row["alone_s"] = round(time.monotonic() - begin)
    return row, done.wrong + different


def about(options: argparse.Namespace) -> dict[str, str]:
    where = machine() if options.device == "cuda" else {"torch": torch.__version__, "commit": commit()}
    load = LOADS[options.device]
    return {
        **where,
        "sglang": version("sglang"),
        "load": str(load),
        "flags": " ".join((*RETRACTION, *REUSE, *options.flags)),
        "environment": " ".join(f"{name}={value}" for name, value in RETRACTION_ENV.items()),
    }


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT.csv")
    parser.add_argument("--minutes", type=float, default=30.0, help="of traffic, after one round of warming up")
    parser.add_argument("--device", choices=LOADS, default="cpu")
    parser.add_argument("--tp", type=int, default=1, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="all that follows is the server's")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse_options()
    row, wrong = soak(options, LOADS[options.device])
    settings = {"device": options.device, "tp": options.tp, "minutes": f"{options.minutes:g}", "seed": options.seed}
    write_csv(options.out, [{**settings, **row}], about(options), "python -m bench.soak.run " + " ".join(sys.argv[1:]))
    for name, value in {**settings, **row}.items():
        print(f"{name:28} {value}")
    for line in wrong[:SHOWN]:
        print(line)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
