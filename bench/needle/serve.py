# SPDX-License-Identifier: Apache-2.0
"""Answer accuracy of the needle checkpoint through real SGLang servers, one policy after the other.

    python -m bench.needle.serve --lengths 8192 16384 32768 65536 --csv bench/results/needle_servers.csv
    python -m bench.needle.serve --device cuda --csv bench/results/needle_servers_h200.csv
    python -m bench.needle.serve --policies tokenselect level-1 level-2 level-3 level-4 --lengths 8192 16384 32768 \
        --csv bench/results/needle_levels.csv

Each context hides 16 keys with one number, 2 keys with 4 numbers and 2 chains of 4 variables; it is asked
for 4 single numbers, for both keys with 4, 3 times for 4 keys at once, and for both chains. Its questions
share it through the radix cache. Seeds are held out from training. Rows are added to the file.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import time
from collections import defaultdict
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from bench.result_file import commit
from sglang_tokenselect.demo_questions import token_counter
from sglang_tokenselect.effort import LOWEST_LEVEL
from sglang_tokenselect.needle import checkpoint_path, tasks
from sglang_tokenselect.needle_server import needle_server
from sglang_tokenselect.server_process import ServerProcess

# Whether attention is dense, and more flags.
POLICIES = {
    "tokenselect": (False, ()),
    # As many tokens as tokenselect attends to, none of them chosen.
    "window": (False, ("--tokenselect-budget", "0", "--tokenselect-local", "576")),
    "dense": (True, ()),
    # Effort levels of decode; that of "tokenselect" is 0.
    **{f"level-{level}": (False, ("--tokenselect-level", str(level))) for level in range(1, LOWEST_LEVEL + 1)},
}
QUESTION_ROOM = 100
MAX_NEW_TOKENS = 64
COLUMNS = (
    "commit",
    "machine",
    "sglang",
    "torch",
    "policy",
    "task",
    "tokens",
    "seed",
    "questions",
    "score",
    "attended",
    "hit_ratio",
    "seconds",
)


def samples_of(length: int, seed: int, count_tokens) -> list[tasks.Sample]:
    held_out = tasks.held_out(1_000_000 * seed + length)
    facts = tasks.draw_facts(random.Random(held_out), values_per_key=[1] * 16 + [4] * 2, names_per_chain=[4] * 2)
    context = tasks.make_context(
        held_out,
        length - QUESTION_ROOM,
        count_tokens=count_tokens,
        haystack="noise" if seed % 2 else "sentences",
        facts=facts,
    )
    needles = facts.needles
    asked = [tasks.ask_number(context, needle) for needle in (*needles[:4], *needles[16:])]
    asked += [tasks.ask_numbers(context, needles[i : i + 4]) for i in (4, 8, 12)]
    return asked + [tasks.ask_variables(context, chain) for chain in facts.chains]


def answer(server: ServerProcess, sample: tasks.Sample) -> str:
    sampling = {"temperature": 0.0, "max_new_tokens": MAX_NEW_TOKENS, "stop": ["\n", "."]}
    return server.post("/generate", {"text": sample.prompt, "sampling_params": sampling})["text"]


def measure(server: ServerProcess, policy: str, length: int, seed: int, count_tokens) -> Iterator[dict]:
    """One row per task. `seconds` is the time of the task's questions; the first pays for the prefill."""
    by_task = defaultdict(list)
    for sample in samples_of(length, seed, count_tokens):
        by_task[sample.task].append(sample)
    for task, samples in by_task.items():
        before = server.counters() if policy != "dense" else None
        begin = time.monotonic()
        scores = [tasks.score(answer(server, sample), sample.answers) for sample in samples]
        seconds = time.monotonic() - begin
        yield {
            "policy": policy,
            "task": task,
            "tokens": length,
            "seed": seed,
            "questions": len(samples),
            "score": f"{sum(scores) / len(scores):.4f}",
            **(read(before, server.counters()) if before else {"attended": "all", "hit_ratio": ""}),
            "seconds": f"{seconds:.1f}",
        }


def read(before: dict[str, int], after: dict[str, int]) -> dict[str, object]:
    """Mean tokens attended to per decode step, and the share of selections that were reused."""
    since = {name: after[name] - before[name] for name in after}
    attended = round(since["attended_tokens"] / max(since["decode_queries"], 1))
    return {"attended": attended, "hit_ratio": f"{since['reuses'] / max(since['reuses'] + since['votes'], 1):.3f}"}


def setting(device: str) -> dict[str, str]:
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    machine = f"{os.cpu_count()} x {models[0].split(':')[1].strip()}"
    if device == "cuda":
        import torch

        machine = torch.cuda.get_device_name()
    return {
        "commit": commit(),
        "machine": machine,
        "sglang": version("sglang"),
        "torch": version("torch"),
    }


def show(rows: list[dict[str, str]]) -> None:
    """Mean score per task, a line per policy and length; the number of questions in brackets."""
    cells = defaultdict(list)
    for row in rows:
        cells[row["policy"], int(row["tokens"]), row["task"]] += [float(row["score"])] * int(row["questions"])
    names = list(dict.fromkeys(row["task"] for row in rows))
    print(f"| policy | tokens | {' | '.join(names)} |\n|{'---|' * (len(names) + 2)}")
    for policy, tokens in dict.fromkeys((policy, tokens) for policy, tokens, _ in cells):
        scores = [cells[policy, tokens, name] for name in names]
        means = [f"{sum(score) / len(score):.3f} ({len(score)})" for score in scores]
        print(f"| {policy} | {tokens:,} | {' | '.join(means)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384, 32768, 65536])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=["tokenselect", "window", "dense"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--show", action="store_true", help="only print the table of the CSV file")
    options = parser.parse_args()
    if options.show:
        with options.csv.open(newline="") as file:
            return show(list(csv.DictReader(file)))
    count_tokens, common = token_counter(checkpoint_path()), setting(options.device)
    with options.csv.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if not file.tell():
            writer.writeheader()
        for policy in options.policies:
            is_dense, flags = POLICIES[policy]
            with needle_server(is_dense, *flags, device=options.device) as server:
                for length in options.lengths:
                    for seed in options.seeds:
                        for row in measure(server, policy, length, seed, count_tokens):
                            writer.writerow({**common, **row})
                            file.flush()
                            print(*row.values(), flush=True)


if __name__ == "__main__":
    main()
