# SPDX-License-Identifier: Apache-2.0
"""Real servers under load on one GPU: dense, TokenSelect, and TokenSelect with the policies that adapt its effort.

    python bench/load/run.py load_1.csv --servers dense fixed
    python bench/load/run.py load_2.csv --servers load slo
    python bench/load/run.py smoke.csv --smoke --servers dense fixed

A Llama-3-8B shape with random weights. For each server and rate, SGLang's own benchmark sends requests with Poisson
arrivals: prompts of 16,384 to 32,768 ids and answers of 256 to 512 tokens, both uniform (the benchmark has one flag for
both ranges), greedy, end of sequence ignored. One seed: all servers get the same requests at the same times. The radix
cache is emptied before each cell. Each server is warmed up by single requests and a burst of 8 of the longest prompt.

The rates, 0.2 to 1.2 requests/s, go from idle to past saturation: prefills alone, 0.75 s for 24k tokens with dense
attention, fill the GPU at 1.3, and all else at 1.2. A cell has rate x 30 s requests, 6 to 36, and takes 35 to 60 s; two
servers and their starts take less than 10 minutes, hence two commands.

Columns. ITL: between consecutive tokens at the client, of all answers, prefills of other requests included; a chunk of
n tokens counts as n equal times. TTFT: from sending. requests_per_s and output_tokens_per_s: over `seconds`, from the
first request to the last answer. mean_requests: in the server, waiting ones included. hit_ratio: reuses of votes and
reuses; attended_share: attended of cached tokens; both of the cell's decode steps. mean_level and mean_budget: of the
cell's decode queries, each with the effort that the server last published before it; what it published is in
OUT_trace.csv, times in seconds since the benchmark's start, some seconds before the first request; what held before has
a negative one.

Both files are written after each cell. A cell without numbers says in its note why. --smoke does the same with a tiny
model and short requests on the CPU: it tests these scripts and measures nothing.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # as a script, this file sees its own folder only

from bench.kernels.timing import machine
from bench.load import client, trace
from bench.load.setups import H200, QUICK, SERVERS, SLO, SMOKE, TOKENSELECT, Setup, server_flags, write_model
from bench.result_file import commit, write_csv
from bench.serve.client import ask, prompts
from bench.serve.run import NOTE_LENGTH, WARM_UP_TOKENS, measure_each
from sglang_tokenselect.server_process import ServerProcess, free_port

COUNTED = ("votes", "reuses", "attended_tokens", "cached_tokens", "decode_queries")

Row = dict[str, object]


class Report:
    """Rows of both files, which are written anew with each cell."""

    def __init__(self, path: Path, about: dict[str, str]) -> None:
        self._paths = path, path.with_stem(f"{path.stem}_trace")
        self._about = about
        self._begin = time.monotonic()
        self._rows: list[Row] = []
        self._trace: list[Row] = []
        self.failed = 0

    def add(self, cell: Row, measure: Callable[[], tuple[Row, list[Row]]]) -> None:
        """The row of one cell; an error becomes its note, and the next cell has its turn."""
        try:
            row, published = measure()
        except Exception as error:
            traceback.print_exc(limit=-4)
            self.failed += 1
            row, published = {"note": "error: " + " ".join(str(error).split())[-NOTE_LENGTH:]}, []
        self._rows.append({**cell, **row})
        self._trace += [{**cell, **told} for told in published]
        for path, rows in zip(self._paths, (self._rows, self._trace), strict=True):
            write_csv(path, rows, self._about, "python " + " ".join(sys.argv))
        self.say(" ".join(f"{name}={value}" for name, value in self._rows[-1].items() if value != ""))

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self._begin:7.1f} s  {text}", flush=True)


class Cells:
    """Cells of one server.

    Args:
        effort: what the server publishes; None of a dense one.
    """

    def __init__(
        self, server: ServerProcess, model: Path, setup: Setup, effort: trace.Trace | None, limit: float
    ) -> None:
        self._server, self._model, self._setup = server, model, setup
        self._effort, self._limit = effort, limit

    def warm_up(self) -> None:
        """Compiles what is compiled at first use."""
        for count, context in (
            (1, self._setup.shortest_prompt),
            (1, self._setup.prompt_tokens),
            (self._setup.burst, self._setup.prompt_tokens),
        ):
            ask(self._server.url, prompts(count, context, self._setup.model["vocab_size"]), WARM_UP_TOKENS)
            self._server.flush()

    def measure(self, rate: float) -> tuple[Row, list[Row]]:
        """The columns of one cell, and the rows of its trace."""
        self._server.flush()
        before, begin = self._counters(), time.time()
        try:
            row = client.run(self._server.url, self._model, self._setup, rate, self._limit)
        finally:  # of a client that was ended, requests may be left
            self._server.post_text("/abort_request", {"rid": "", "abort_all": True})
        if self._effort is None:
            return row, []
        after, end = self._counters(), time.time()
        published = self._effort.between(begin, end)
        effort = trace.mean_effort(published, before["decode_queries"], after["decode_queries"])
        counted = shares({name: after[name] - before[name] for name in COUNTED})
        return {**row, **counted, **effort}, [trace.row(snapshot, begin) for snapshot in published]

    def _counters(self) -> dict[str, int]:
        return {} if self._effort is None else self._server.counters()


def shares(counted: dict[str, int]) -> Row:
    """What the counters of a cell say; a ratio without anything counted is blank."""
    votes, reuses, attended, cached, queries = (counted[name] for name in COUNTED)
    return {
        "decode_queries": queries,
        "votes": votes,
        "reuses": reuses,
        "hit_ratio": round(reuses / (votes + reuses), 4) if votes + reuses else "",
        "attended_share": round(attended / cached, 4) if cached else "",
    }


def measure_server(name: str, model: Path, setup: Setup, options: argparse.Namespace, report: Report) -> None:
    backend, flags = server_flags(setup, name, options.load_requests, options.itl_target_ms)
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    is_sparse = backend == TOKENSELECT
    if is_sparse:
        flags = (*flags, "--tokenselect-publish", endpoint)
    with (
        trace.Trace(endpoint) if is_sparse else nullcontext() as effort,
        ServerProcess(model, *setup.flags, *flags, backend=backend) as server,
    ):
        report.say(f"{name} is ready")
        cells = Cells(server, model, setup, effort, options.limit)
        cells.warm_up()
        report.say(f"{name} is warm")
        failed = report.failed
        for rate in setup.rates:
            report.add({"server": name, "rate": rate}, lambda rate=rate: cells.measure(rate))
        if report.failed > failed:
            print(server.log_tail(), flush=True)


def where() -> dict[str, str]:
    """What the numbers depend on, with a GPU or without."""
    return machine() if torch.cuda.is_available() else {"torch": torch.__version__, "commit": commit()}


def about(setup: Setup, options: argparse.Namespace) -> dict[str, str]:
    described = {
        f"server {name}": " ".join((backend, *flags))
        for name in options.servers
        for backend, flags in [server_flags(setup, name, options.load_requests, options.itl_target_ms)]
    }
    target = {"itl_target_ms": f"{options.itl_target_ms:g}"} if SLO in options.servers else {}
    requests = f"Poisson arrivals, prompts of {setup.shortest_prompt} to {setup.prompt_tokens} tokens, "
    requests += f"answers of {int(client.RANGE_RATIO * setup.output_tokens)} to {setup.output_tokens}"
    setting = {"sglang": version("sglang"), "setting": setup.described, "requests": requests}
    return {**where(), **setting, "flags": " ".join(setup.flags), **described, **target}


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT.csv")
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=list(SERVERS))
    parser.add_argument("--rates", nargs="+", type=float, metavar="PER_SECOND", help="requests per second")
    parser.add_argument("--duration", type=float, metavar="SECONDS", help="of arrivals in a cell, on average")
    parser.add_argument("--limit", type=float, default=120.0, metavar="SECONDS", help="end a cell that takes longer")
    parser.add_argument("--load-requests", type=int, default=16, metavar="N", help="of policy load")
    parser.add_argument("--itl-target-ms", type=float, default=9.0, metavar="MS", help="of policy slo")
    parser.add_argument("--quick", action="store_true", help="two short cells, to see that everything works")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on the CPU, to test these scripts")
    return parser.parse_args(arguments)


def setup_of(options: argparse.Namespace) -> Setup:
    setup = SMOKE if options.smoke else QUICK if options.quick else H200
    rates, duration = options.rates or setup.rates, options.duration or setup.duration
    return replace(setup, rates=tuple(rates), duration=duration)


def main() -> None:
    options = parse_options()
    setup = setup_of(options)
    client.prepare()
    report = Report(options.out, about(setup, options))
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(setup, Path(folder))
        measure_each(options.servers, lambda name: measure_server(name, model, setup, options, report), report)


if __name__ == "__main__":
    main()
