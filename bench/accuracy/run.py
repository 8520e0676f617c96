# SPDX-License-Identifier: Apache-2.0
"""Accuracy of the shipped checkpoint by policy, budget, sub-block and reuse, through real servers and
`sglang-tokenselect eval`.

    python bench/accuracy/run.py OUT.csv policies [--device cuda] [--variants vote page] [--lengths 4096] [--samples 2]
    python bench/accuracy/run.py OUT.csv sub_block
    python bench/accuracy/run.py OUT.csv reuse

All servers of an experiment run at once, side by side (each takes 3 GB on a GPU), each asked by a process of its own:
so times say nothing, and none are written. What was asked is in a folder beside OUT.csv, and a run that was stopped
goes on from there.

A row is a task, length and seed: `score` is the mean of as many `questions`. `attended` (tokens of a decode step) and
`hit_ratio` (reuses of votes and reuses) are of the variant, budget and length.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import multiprocessing
import sys
from collections.abc import Iterator
from contextlib import ExitStack, redirect_stdout
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # as a script, this file sees its own folder only

from bench.accuracy.experiments import CONTEXT_LENGTH, EXPERIMENTS, SEEDS, TASKS, Variant, chosen
from bench.needle.serve import setting
from bench.result_file import write_csv
from sglang_tokenselect import cli
from sglang_tokenselect.evaluation.discover import read_counters
from sglang_tokenselect.needle_server import needle_server
from sglang_tokenselect.server_process import ServerProcess

START_TIMEOUT = 420.0
FLAGS = (
    *("--context-length", str(CONTEXT_LENGTH), "--max-total-tokens", "600000"),
    *("--cuda-graph-max-bs-decode", "8", "--max-running-requests", "16"),
)


def start(stack: ExitStack, variants: list[Variant], device: str) -> list[ServerProcess]:
    """All of them at once; each is ended with the stack."""
    servers = []
    for variant in variants:
        server = needle_server(variant.is_dense, *FLAGS, *variant.flags, device=device)
        stack.callback(server.stop)
        server.start()
        servers.append(server)
    for server in servers:
        server.wait_until_ready(START_TIMEOUT)
    return servers


def ask_all(variant: Variant, url: str, folder: Path) -> None:
    """Each length and budget, shorter ones first."""
    for length in variant.lengths:
        for budget in variant.budgets or (None,):
            ask(variant, url, folder / f"{length}-{budget}", length, budget)


def ask(variant: Variant, url: str, folder: Path, length: int, budget: int | None) -> None:
    """Leaves the answers in `folder`, and what the server counted meanwhile in counters.json there."""
    counted = folder / "counters.json"
    if counted.exists():
        return
    own = {"custom_params": {"tokenselect": {"budget": budget}}} if budget is not None else {}
    before = read_counters(url, None)
    asked = ("eval", "--url", url, "--tasks", ",".join(TASKS), "--lengths", str(length), "--depths", "0")
    seeds = ("--seeds", ",".join(map(str, SEEDS)), "--samples", str(variant.samples_at(length)))
    with redirect_stdout(io.TextIOWrapper(io.BytesIO())):
        code = cli.main([*asked, *seeds, "--extra-body", json.dumps(own), "--out", str(folder)])
    if code:
        raise RuntimeError(f"{variant.name}, {length} tokens, budget {budget}: eval ended with {code}")
    after = read_counters(url, None)
    counted.write_text(json.dumps({name: count - before.get(name, 0) for name, count in after.items()}))
    print(variant.name, length, budget, flush=True)


def rows(variant: Variant, folder: Path) -> Iterator[dict[str, object]]:
    for length in variant.lengths:
        for budget in variant.budgets or (None,):
            place = folder / f"{length}-{budget}"
            counts = json.loads((place / "counters.json").read_text())
            with (place / "results.csv").open(newline="") as file:
                for cell in csv.DictReader(file):
                    yield {
                        "variant": variant.name,
                        "budget": budget,
                        **{name: cell[name] for name in ("task", "length", "seed", "questions", "score")},
                        **measures(counts),
                    }


def measures(counts: dict[str, int]) -> dict[str, object]:
    """Of a dense server there are none."""
    steps, selections = counts.get("decode_queries", 0), counts.get("reuses", 0) + counts.get("votes", 0)
    return {
        "attended": round(counts["attended_tokens"] / steps) if steps else "all",
        "hit_ratio": f"{counts['reuses'] / selections:.3f}" if selections else "",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--variants", nargs="+", help="some of the experiment's")
    parser.add_argument("--lengths", type=int, nargs="+", help="some of the experiment's")
    parser.add_argument("--samples", type=int, help="of each task, length and seed")
    args = parser.parse_args()
    variants = chosen(args.experiment, args.variants, args.lengths, args.samples)
    folders = [args.csv.with_suffix("") / variant.name.replace(" ", "_") for variant in variants]
    with ExitStack() as stack:
        servers = start(stack, variants, args.device)
        context = multiprocessing.get_context("spawn")
        askers = [
            context.Process(target=ask_all, args=(variant, server.url, folder))
            for variant, server, folder in zip(variants, servers, folders, strict=True)
        ]
        for asker in askers:
            asker.start()
        for asker in askers:
            asker.join()
        if any(asker.exitcode for asker in askers):
            sys.exit("a server was not asked everything; see above. The same command goes on from there")
    found = [row for variant, folder in zip(variants, folders, strict=True) for row in rows(variant, folder)]
    about = {**setting(args.device), "positions": "compact", "tokenselect": version("sglang-tokenselect")}
    write_csv(args.csv, found, about, "python " + " ".join(sys.argv))


if __name__ == "__main__":
    main()
