# SPDX-License-Identifier: Apache-2.0
"""Accuracy of the shipped checkpoint by policy, budget, sub-block and reuse, through real servers and
`sglang-tokenselect eval`.

    python bench/accuracy/run.py OUT.csv policies [--device cuda] [--variants vote page] [--lengths 4096] [--samples 2]
    python bench/accuracy/run.py OUT.csv sub_block
    python bench/accuracy/run.py OUT.csv reuse

All servers of an experiment run at once, side by side (each takes 3 GB on a GPU), each asked by a process of its own:
so times say nothing, and none are written. What was asked is in a folder beside OUT.csv, from where a run that was
stopped goes on; where nothing is left to ask, no server is started.

A row is a task, length and seed: `score` is the mean of as many `questions`. `attended` (tokens of a decode step) and
`hit_ratio` (reuses of votes and reuses) are of the variant, budget and length, and so is the `commit` that was asked.
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

MEASURED = "measured.json"
SETTING = ("commit", "machine", "sglang", "torch")
"""Of each cell; what is the same for all goes into the file's comment lines."""
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


def cells(variant: Variant, folder: Path) -> Iterator[tuple[int, int | None, Path]]:
    """Each length and budget, shorter ones first, and where it is kept: `MEASURED` is there when it is complete."""
    for length in variant.lengths:
        for budget in variant.budgets or (None,):
            yield length, budget, folder / f"{length}-{budget}"


def unfinished(variant: Variant, folder: Path) -> list[tuple[int, int | None, Path]]:
    return [cell for cell in cells(variant, folder) if not (cell[2] / MEASURED).exists()]


def ask_all(variant: Variant, url: str, folder: Path, device: str) -> None:
    for length, budget, place in unfinished(variant, folder):
        counts = ask(variant, url, place, length, budget)
        (place / MEASURED).write_text(json.dumps({"counters": counts, "setting": setting(device)}))
        print(variant.name, length, budget, flush=True)


def ask(variant: Variant, url: str, folder: Path, length: int, budget: int | None) -> dict[str, int]:
    """Leaves the answers in `folder`. Returns what the server counted meanwhile."""
    own = {"custom_params": {"tokenselect": {"budget": budget}}} if budget is not None else {}
    before = read_counters(url, None)
    asked = ("eval", "--url", url, "--tasks", ",".join(TASKS), "--lengths", str(length), "--depths", "0")
    seeds = ("--seeds", ",".join(map(str, SEEDS)), "--samples", str(variant.samples_at(length)))
    # The command line reconfigures its stdout, which a StringIO does not let it.
    with redirect_stdout(io.TextIOWrapper(io.BytesIO())):
        code = cli.main([*asked, *seeds, "--extra-body", json.dumps(own), "--out", str(folder)])
    if code:
        raise RuntimeError(f"{variant.name}, {length} tokens, budget {budget}: eval ended with {code}")
    after = read_counters(url, None)
    return {name: count - before.get(name, 0) for name, count in after.items()}


def rows(variant: Variant, folder: Path) -> Iterator[dict[str, object]]:
    for _, budget, place in cells(variant, folder):
        measured = json.loads((place / MEASURED).read_text())
        with (place / "results.csv").open(newline="") as file:
            for cell in csv.DictReader(file):
                yield {
                    "variant": variant.name,
                    "budget": budget,
                    **{name: cell[name] for name in ("task", "length", "seed", "questions", "score")},
                    **measures(measured["counters"]),
                    **measured["setting"],
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
    folders = {variant: args.csv.with_suffix("") / variant.name.replace(" ", "_") for variant in variants}
    ask_servers([v for v in variants if unfinished(v, folders[v])], folders, args.device)
    found = [row for variant in variants for row in rows(variant, folders[variant])]
    common = {name: found[0][name] for name in SETTING if len({row[name] for row in found}) == 1}
    varying = [{name: value for name, value in row.items() if name not in common} for row in found]
    about = {**common, "positions": "compact", "tokenselect": version("sglang-tokenselect")}
    write_csv(args.csv, varying, about, "python " + " ".join(sys.argv))


def ask_servers(variants: list[Variant], folders: dict[Variant, Path], device: str) -> None:
    """
    Raises:
        SystemExit: a server was not asked everything.
    """
    with ExitStack() as stack:
        servers = start(stack, variants, device)
        context = multiprocessing.get_context("spawn")
        askers = [
            context.Process(target=ask_all, args=(variant, server.url, folders[variant], device))
            for variant, server in zip(variants, servers, strict=True)
        ]
        for asker in askers:
            asker.start()
        for asker in askers:
            asker.join()
        if any(asker.exitcode for asker in askers):
            sys.exit("a server was not asked everything; see above. The same command goes on from there")


if __name__ == "__main__":
    main()
