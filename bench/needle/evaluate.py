# SPDX-License-Identifier: Apache-2.0
"""Answer accuracy of the needle checkpoint by task, length and attention policy, on held-out seeds.

    python -m bench.needle.evaluate --lengths 8192 32768 --policies dense window 64+448+128 \
        --csv bench/results/needle_torch.csv

A policy is ``dense``, ``window`` (sink and local tokens alone, compact positions) or
``sink+budget+local[/block/sub_block]`` (TokenSelect, compact positions).
"""

from __future__ import annotations

import argparse
import csv
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.multiprocessing
from tokenizers import Tokenizer

from bench.needle import tokenizer as needle_tokenizer
from bench.needle.generate import Policy, Request
from bench.needle.model import load_checkpoint
from bench.result_file import commit
from sglang_tokenselect.kernels.reference.window import Window
from sglang_tokenselect.needle import checkpoint_path, tasks

QUESTION_ROOM = 100
"""Tokens of a length that are kept for the question and its answer."""
MAX_NEW = 64
COLUMNS = ("commit", "gpu", "torch", "config", "task", "tokens", "policy", "seed", "questions", "score")


@dataclass(frozen=True)
class Job:
    """All tasks at one length, with one policy and one seed."""

    tokens: int
    policy: Policy
    seed: int
    questions: int


def parse_policy(text: str) -> Policy:
    if text == "dense":
        return Policy("dense")
    if text == "window":
        return Policy("window", Window(64, 0, 576), "compact")
    sizes, *blocks = text.split("/")
    block, sub_block = map(int, blocks) if blocks else (128, 16)
    return Policy("tokenselect", Window(*map(int, sizes.split("+"))), "compact", block, sub_block)


def task_contexts(task: tasks.Task, job: Job, tokenizer: Tokenizer) -> Iterator[list[tasks.Sample]]:
    """Questions of contexts, one list per context, until ``job.questions`` are asked.

    32 needle sentences from 1,024 tokens on; even seeds hide them in template sentences, odd seeds
    in RULER's noise.
    """
    needles = 4 if job.tokens < 512 else 12 if job.tokens < 1024 else 32
    shape = {
        "single": {"num_needles": 1},
        "multi_key": {"num_needles": needles},
        "multi_value": {"num_needles": needles, "values_per_key": 4},
        "multi_query": {"num_needles": needles},
        "variable_tracking": {"num_needles": 0, "num_chains": 4 if needles == 32 else 1, "hops": 4},
    }[task]
    asked, draw = 0, random.Random(f"{task} {job.tokens} {job.seed}")
    while asked < job.questions:
        context = tasks.make_context(
            tasks.held_out(draw.randrange(1 << 32)),
            job.tokens - QUESTION_ROOM,
            count_tokens=lambda text: len(tokenizer.encode(text).ids),
            haystack="noise" if job.seed % 2 else "sentences",
            **shape,
        )
        samples = tasks.questions(context, keys_per_question=4 if task == "multi_query" else 1)
        samples = draw.sample(samples, min(len(samples), job.questions - asked))
        asked += len(samples)
        yield samples


class Evaluator:
    def __init__(self, checkpoint: Path, device: str) -> None:
        self.model = load_checkpoint(checkpoint).to(device)
        if device == "cpu":
            self.model.float()
        self.tokenizer = Tokenizer.from_file(str(checkpoint / "tokenizer.json"))
        self.eos_id = self.tokenizer.token_to_id(needle_tokenizer.EOS)

    def run(self, job: Job) -> list[dict]:
        """One row per task."""
        rows = []
        for task in tasks.TASKS:
            scores = [s for samples in task_contexts(task, job, self.tokenizer) for s in self._scores(samples, job)]
            row = {"config": str(job.policy), "task": task, "tokens": job.tokens, "policy": job.policy.name}
            rows.append(row | {"seed": job.seed, "questions": len(scores), "score": sum(scores) / len(scores)})
        return rows

    def _scores(self, samples: list[tasks.Sample], job: Job) -> Iterator[float]:
        context = self.tokenizer.encode(samples[0].context.text).ids
        request = Request(self.model, job.policy, len(context) + QUESTION_ROOM + MAX_NEW)
        request.extend(context)
        for sample in samples:
            request.rewind(len(context))
            answer = request.answer(self.tokenizer.encode(sample.question).ids, MAX_NEW, self.eos_id)
            yield tasks.score(self.tokenizer.decode(answer), sample.answers)


_evaluator: Evaluator


def _start_worker(checkpoint: Path, device: str) -> None:
    global _evaluator
    torch.set_num_threads(1)
    _evaluator = Evaluator(checkpoint, device)


def _run_job(job: Job) -> list[dict]:
    return _evaluator.run(job)


def run_jobs(jobs: list[Job], checkpoint: Path, device: str, processes: int) -> Iterator[dict]:
    """Rows as they come. Longest first, in several processes: one leaves a GPU mostly idle."""
    jobs = sorted(jobs, key=lambda job: -job.tokens)
    context = torch.multiprocessing.get_context("spawn")
    with context.Pool(processes, _start_worker, (checkpoint, device)) as pool:
        for rows in pool.imap_unordered(_run_job, jobs, chunksize=1):
            yield from rows


def print_table(rows: list[dict]) -> None:
    """Mean score over seeds: a line per config and task, a column per length."""
    lengths = sorted({int(row["tokens"]) for row in rows})
    width = max(len(row["config"]) for row in rows)
    print(f"{'config':{width}} {'task':18}" + "".join(f"{n:>8}" for n in lengths))
    for config in sorted({row["config"] for row in rows}):
        for task in (*tasks.TASKS, "mean"):
            cells: dict[int, list[float]] = {}
            for row in rows:
                if row["config"] == config and task in (row["task"], "mean"):
                    cells.setdefault(int(row["tokens"]), []).append(float(row["score"]))
            scores = (f"{sum(cells[n]) / len(cells[n]):8.3f}" if n in cells else " " * 8 for n in lengths)
            print(f"{config:{width}} {task:18}" + "".join(scores), flush=True)


def write_csv(path: Path, rows: Iterable[dict], commit: str, device: str) -> list[dict]:
    """Writes rows as they come and returns them all."""
    gpu = torch.cuda.get_device_name() if device == "cuda" else "none"
    machine = {"commit": commit, "gpu": gpu, "torch": torch.__version__}
    path.parent.mkdir(parents=True, exist_ok=True)
    written = []
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow(machine | row | {"score": round(row["score"], 4)})
            file.flush()
            written.append(row)
    return written


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=checkpoint_path())
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--policies", nargs="+", type=parse_policy, default=[Policy("dense")])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--questions", type=int, default=8, help="per task, length and seed")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--csv", type=Path, default=Path("bench/results/needle_torch.csv"))
    parser.add_argument("--show", action="store_true", help="only print the table of the CSV file")
    parser.add_argument("--commit", help="for a working tree without .git")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    if args.show:
        with args.csv.open(newline="") as file:
            return print_table(list(csv.DictReader(file)))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    jobs = [
        Job(tokens, policy, seed, args.questions)
        for tokens in args.lengths
        for policy in args.policies
        for seed in range(args.seeds)
    ]
    rows = run_jobs(jobs, args.checkpoint, device, args.processes)
    print_table(write_csv(args.csv, rows, args.commit or commit(), device))


if __name__ == "__main__":
    main()
