# SPDX-License-Identifier: Apache-2.0
"""What must hold of a soak: answers as alone, an idle server that holds nothing, a log without faults."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.soak.clients import Clients, Outcome, is_same
from bench.soak.memory import Sample
from bench.soak.traffic import Question
from sglang_tokenselect.needle import tasks
from sglang_tokenselect.server_process import ServerProcess

RETRACTED = re.compile(r"#retracted_reqs: (\d+)")
# What SGLang's log says of a process that failed, and of its own checks of memory and of the radix cache.
FAULTS = re.compile(r"Traceback|leak detected|SIGQUIT|hit an exception|AssertionError|Out of memory")


@dataclass(frozen=True)
class Alone:
    """Answers of the idle server.

    Attributes:
        right: how many hold what was asked for.
    """

    texts: dict[Question, str]
    right: int


def ask_alone(clients: Clients, questions: Iterable[Question]) -> Alone:
    texts = {question: clients.alone(question) for question in dict.fromkeys(questions)}
    right = sum(tasks.score(text, question.answers) == 1.0 for question, text in texts.items())
    return Alone(texts, right)


def mismatches(outcomes: Sequence[Outcome], alone: Alone) -> list[str]:
    """One line for each answer that differs from the one alone."""
    found = []
    for outcome in outcomes:
        if outcome.request.kind == "bad" or outcome.error is not None:
            continue
        expected = alone.texts[outcome.request.question]
        if not is_same(outcome.text, expected, outcome.finished):
            right = "/".join(outcome.request.question.answers)
            crowd = f"as alone ({right}), after {outcome.retractions} retractions"
            found.append(f"{outcome.request.question}: expected {expected!r} {crowd}, got {outcome.text!r}")
    return found


def idle_faults(server: ServerProcess, patience: float = 60.0) -> list[str]:
    """What an idle server still holds: requests, or slots of the KV pool that no radix cache may give back.

    Waits for what clients left behind. SGLang checks its pools itself whenever it is idle, and ends if one leaks.
    """
    end = time.monotonic() + patience
    while (held := _held(server)) and time.monotonic() < end:
        time.sleep(0.5)
    return held


def _held(server: ServerProcess) -> list[str]:
    names = ("num_running_reqs", "num_waiting_reqs", "num_used_tokens")
    loads = server.get("/v1/loads")["loads"]
    return [f"{name}: expected 0 when idle, got {load[name]}" for load in loads for name in names if load[name]]


def lent_faults(samples: Sequence[Sample], most: int) -> list[str]:
    """Moments at which the selection cache had more holders than there are rows for running requests."""
    lent = max(sample.lent_entries for sample in samples)
    return [f"lent_entries: expected at most {most}, got {lent}"] if lent > most else []


def log_faults(log: str) -> list[str]:
    return [line[:300] for line in log.splitlines() if FAULTS.search(line)]


def count_retracted(log: str) -> int:
    return sum(map(int, RETRACTED.findall(log)))
