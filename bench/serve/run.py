# SPDX-License-Identifier: Apache-2.0
"""Times to the first token and between tokens of real servers, dense and sparse, in one run.

    python bench/serve/run.py OUT.csv [--servers dense miss hit default] [--quick]
    python bench/serve/run.py OUT.csv --servers dense default --itl 8x32768 1x1024 --ttft 2048 131072
    python bench/serve/run.py OUT.csv --servers dense miss miss-local --itl 8x32768 -- --tp 2

A Llama-3-8B shape with random weights; prompts of random ids, the same for every server, the radix cache emptied
before each cell. The servers differ in nothing but what `cells.SERVERS` says.

ITL, milliseconds: gaps between consecutive tokens as they arrive at the client, of all requests of the cell, only
while all of them decode. Median, 20th and 80th percentile. Votes and reuses are those of the cell's decode steps,
summed over requests and layers: they prove what the cell measured.

TTFT, seconds: one request alone, from sending it to its first token; median, minimum (p20), maximum (p80). The request
of an ITL cell of one is a sample of its context as well.

The file is written after each cell. A cell without numbers says in its note why.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from typing import Protocol

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # as a script, this file sees its own folder only

from bench.kernels.timing import machine
from bench.result_file import spread, write_csv
from bench.serve.cells import (
    FLAGS,
    MODEL,
    NEW_TOKENS,
    ONE_GPU,
    SERVERS,
    WARM_UP_CONTEXTS,
    parse_cell,
    plan_of,
    ttft_repeats,
    write_model,
)
from bench.serve.client import Answer, ask, prompts
from bench.serve.gaps import common_gaps
from sglang_tokenselect.server_process import ServerProcess

WARM_UP_TOKENS = 16
PAUSE = 0.05  # seconds; the scheduler ends a request some milliseconds after its last token
MEMORY_SLACK = 2**30  # bytes
NOTE_LENGTH = 300
COLUMNS = ("median", "p20", "p80", "samples", "votes", "reuses", "note")


class Failures(Protocol):
    """What counts them: a report."""

    failed: int


class Report:
    """Rows of the file, which is written anew with each.

    Args:
        columns: of each row beside those that name its cell; blank where a cell has no number.
    """

    def __init__(self, path: Path, about: dict[str, str], columns: Sequence[str] = COLUMNS) -> None:
        self._path, self._about = path, about
        self._empty = dict.fromkeys(columns, "")
        self._begin = time.perf_counter()
        self._rows: list[dict[str, object]] = []
        self.failed = 0

    def add(self, cell: dict[str, object], measure: Callable[[], dict[str, object]]) -> None:
        """The row of one cell; an error becomes its note, and the next cell has its turn."""
        try:
            row = {**cell, **self._empty, **measure()}
        except Exception as error:
            traceback.print_exc(limit=-4)
            self.failed += 1
            row = {**cell, **self._empty, "note": "error: " + " ".join(str(error).split())[:NOTE_LENGTH]}
        self._rows.append(row)
        write_csv(self._path, self._rows, self._about, "python " + " ".join(sys.argv))
        self.say(" ".join(str(value) for value in row.values() if value != ""))

    def say(self, text: str) -> None:
        print(f"{time.perf_counter() - self._begin:7.1f} s  {text}", flush=True)


class Client:
    """Cells of one server. The first tokens of all requests that were alone are kept, by their context."""

    def __init__(self, server: ServerProcess, counts: bool) -> None:
        self._server, self._counts = server, counts
        self._ttfts: dict[int, list[float]] = defaultdict(list)

    def warm_up(self) -> None:
        """Compiles what is compiled at first use."""
        for context in WARM_UP_CONTEXTS:
            self._ask(1, context, WARM_UP_TOKENS)

    def itl(self, batch: int, context: int) -> dict[str, object]:
        self._server.flush()
        before = self._counters()
        answers = self._ask(batch, context, NEW_TOKENS)
        after = self._counters()
        if batch == 1:
            self._ttfts[context].append(answers[0].ttft)
        gaps = common_gaps(answers)
        return {
            **_numbers(*spread([1e3 * seconds for seconds in gaps.seconds])),
            "samples": len(gaps.seconds),
            **{name: after[name] - before[name] for name in after},
            "note": f"{gaps.merged} of {gaps.chunks} chunks with several tokens" if gaps.merged else "",
        }

    def ttft(self, context: int) -> dict[str, object]:
        # Once: it empties the allocator too, which the next request pays for. Each repeat has ids of its own.
        self._server.flush()
        ttfts = self._ttfts[context]
        for repeat in range(len(ttfts), ttft_repeats(context)):
            time.sleep(PAUSE)
            ttfts.append(self._ask(1, context, 1, repeat)[0].ttft)
        return {**_numbers(statistics.median(ttfts), min(ttfts), max(ttfts)), "samples": len(ttfts)}

    def _ask(self, batch: int, context: int, new_tokens: int, repeat: int = 0) -> list[Answer]:
        return ask(self._server.url, prompts(batch, context, MODEL["vocab_size"], repeat), new_tokens)

    def _counters(self) -> dict[str, int]:
        if not self._counts:
            return {}
        counters = self._server.counters()
        return {name: counters[name] for name in ("votes", "reuses")}


def _numbers(median: float, p20: float, p80: float) -> dict[str, object]:
    return {"median": f"{median:.4f}", "p20": f"{p20:.4f}", "p80": f"{p80:.4f}"}


def make_server(name: str, model: Path, options: argparse.Namespace) -> ServerProcess:
    backend, flags = SERVERS[name]
    return ServerProcess(model, *FLAGS, *flags, *options.flags, backend=backend)


def measure_server(name: str, server: ServerProcess, options: argparse.Namespace, report: Report) -> None:
    itl_cells, ttft_contexts = plan_of(name, options.itl, options.ttft, options.quick)
    report.say(f"{name} is ready")
    client = Client(server, SERVERS[name][0] == "tokenselect")
    client.warm_up()
    report.say(f"{name} is warm")
    failed = report.failed
    for batch, context in itl_cells:
        cell = {"server": name, "metric": "ITL ms", "batch": batch, "context": context}
        report.add(cell, lambda batch=batch, context=context: client.itl(batch, context))
    for context in ttft_contexts:
        cell = {"server": name, "metric": "TTFT s", "batch": 1, "context": context}
        report.add(cell, lambda context=context: client.ttft(context))
    if report.failed > failed:
        print(server.log_tail(), flush=True)


def measure_side_by_side(model: Path, options: argparse.Namespace, report: Report) -> None:
    """All servers are started at once, which takes the time of one, and idle while another is measured."""
    servers = {name: make_server(name, model, options) for name in options.servers}
    with ExitStack() as stack, ThreadPoolExecutor(len(servers)) as pool:
        list(pool.map(stack.enter_context, servers.values()))
        for name, server in servers.items():
            measure_server(name, server, options, report)
    if report.failed:
        raise SystemExit(f"{report.failed} cells failed")


def wait_for_memory(free_before: int, patience: float = 30.0) -> None:
    """Until the memory of an ended server is free again: the next one sizes its cache by what it finds.

    Args:
        free_before: bytes that were free before the first server.
        patience: seconds.

    Raises:
        RuntimeError: it is not.
    """
    deadline = time.monotonic() + patience
    while (free := torch.cuda.mem_get_info()[0]) < free_before - MEMORY_SLACK:
        if time.monotonic() > deadline:
            raise RuntimeError(f"{free} bytes of the GPU are free, {free_before} were before the first server")
        time.sleep(1.0)


def measure_each(servers: Sequence[str], measure: Callable[[str], None], report: Failures) -> None:
    """One server after the other, each once the memory of the one before is free again.

    Raises:
        SystemExit: at the end, if any cell or server failed.
    """
    free_before = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0
    for name in servers:
        try:
            if free_before:
                wait_for_memory(free_before)
            measure(name)
        except Exception:  # it did not start, or did not answer: the others still can
            traceback.print_exc(limit=-4)
            report.failed += 1
    if report.failed:
        raise SystemExit(f"{report.failed} cells or servers failed")


def about(servers: Sequence[str], flags: Sequence[str] = ()) -> dict[str, str]:
    described = {f"server {name}": " ".join([SERVERS[name][0], *SERVERS[name][1]]) for name in servers}
    setting = "Llama-3-8B shape, bfloat16, random weights and prompts"
    return {
        **machine(),
        "sglang": version("sglang"),
        "setting": setting,
        "flags": " ".join([*FLAGS, *flags]),
        **described,
    }


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT.csv")
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=ONE_GPU)
    parser.add_argument("--itl", nargs="+", type=parse_cell, metavar="REQUESTSxTOKENS", help="these cells only")
    parser.add_argument("--ttft", nargs="+", type=int, metavar="TOKENS", help="these contexts only")
    parser.add_argument("--quick", action="store_true", help="a few small cells, to see that everything works")
    parser.add_argument(
        "--side-by-side",
        action="store_true",
        help="start all servers first (say -- --max-total-tokens so that they fit)",
    )
    parser.epilog = "behind -- come flags of all servers, such as -- --tp 2"
    given = sys.argv[1:] if arguments is None else list(arguments)
    end = given.index("--") if "--" in given else len(given)
    return parser.parse_args(given[:end], argparse.Namespace(flags=given[end + 1 :]))


def main() -> None:
    options = parse_options()
    report = Report(options.out, about(options.servers, options.flags))
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder))
        if options.side_by_side:
            measure_side_by_side(model, options, report)
            return

        def measure(name: str) -> None:
            with make_server(name, model, options) as server:
                measure_server(name, server, options, report)

        measure_each(options.servers, measure, report)


if __name__ == "__main__":
    main()
