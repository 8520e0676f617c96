# SPDX-License-Identifier: Apache-2.0
"""All tasks by name, and how a sample is drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sglang_tokenselect.needle.tasks import score as needle_score

from . import infinitebench, ruler_tracking, ruler_words, scores
from .needle_suite import MANY, ONE_NEEDLE, NeedleTask
from .ruler_niah import Niah
from .sample import Sample
from .sizing import Request

Score = Callable[[str, Sequence[str]], float]
SUITES = ("ruler", "infinitebench", "needle")


@dataclass(frozen=True)
class Task:
    """A kind of question.

    Attributes:
        summary: one line.
        has_depth: one fact is asked for, whose place can be given.
        score: of a prediction and the answers, 0 to 1.
    """

    name: str
    suite: str
    summary: str
    has_depth: bool
    draw: Callable[[Request], Sample]
    score: Score


def draw(
    task: Task, length: int, seed: int, index: int, count_tokens: Callable[[str], int], depth: float | None = None
) -> Sample:
    """The sample of this length, seed and index; the same arguments draw the same sample.

    Args:
        length: tokens of prompt, answer prefix and answer together, at most, and short of it by little.
        count_tokens: tokens of a text, as the server counts them; a function of its own for each tokenizer.
        depth: where the fact asked for stands, 0 (start) to 1 (end); anywhere if None.

    Raises:
        ValueError: the length does not do for the task, or there is no such depth.
    """
    if depth is not None and not task.has_depth:
        raise ValueError(f"depth: expected none for {task.name}, got {depth}")
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth: expected 0 <= depth <= 1, got {depth}")
    return task.draw(Request(task.name, length, seed, index, count_tokens, depth))


def check(task: Task, length: int, seed: int, index: int, count_tokens: Callable[[str], int]) -> None:
    """Sees if a sample can be drawn, without counting a long text. Another one's words may take a few tokens more.

    Raises:
        ValueError: the length does not do for the task.
    """
    task.draw(Request(task.name, length, seed, index, count_tokens, is_trial=True))


def _niah(name: str, summary: str, variant: Niah) -> Task:
    return Task(name, "ruler", summary, variant.has_depth, variant.draw, scores.contained)


def _ruler(name: str, summary: str, draw: Callable[[Request], Sample]) -> Task:
    return Task(name, "ruler", summary, False, draw, scores.contained)


def _infinitebench(
    name: str, summary: str, draw: Callable[[Request], Sample], score: Score = scores.first_integer
) -> Task:
    return Task(name, "infinitebench", summary, True, draw, score)


def _needle(name: str, summary: str, task: NeedleTask, has_depth: bool = False) -> Task:
    return Task(name, "needle", summary, has_depth, task.draw, needle_score)


_ALL = (
    _niah("niah_single_1", "a number for a key, in one repeated line", Niah("noise")),
    _niah("niah_single_2", "a number for a key, in varied sentences", Niah("sentences")),
    _niah("niah_single_3", "a UUID for a key, in varied sentences", Niah("sentences", values="uuids")),
    _niah("niah_multikey_1", "one of 4 keys' numbers, in varied sentences", Niah("sentences", num_keys=4)),
    _niah("niah_multikey_2", "a number for a key, among the numbers of other keys", Niah("needles")),
    _niah("niah_multikey_3", "a UUID for a UUID, among other such pairs", Niah("needles", "uuids", "uuids")),
    _niah("niah_multivalue", "all 4 numbers of a key, in varied sentences", Niah("sentences", num_values=4)),
    _niah("niah_multiquery", "the numbers of 4 keys, in varied sentences", Niah("sentences", num_keys=4, num_asked=4)),
    _ruler("vt", "the 5 variables of a chain of assignments, in one repeated line", ruler_tracking.draw),
    _ruler("cwe", "the 10 most common words of a list", ruler_words.draw_common),
    _ruler("fwe", "the 3 most frequent words of a coded text", ruler_words.draw_frequent),
    _infinitebench("passkey", "5 digits, in one repeated line", infinitebench.draw_passkey),
    _infinitebench("number_string", "10 digits in runs, in one repeated line", infinitebench.draw_number_string),
    _infinitebench(
        "kv_retrieval", "a UUID for a UUID, in a JSON object", infinitebench.draw_kv_retrieval, scores.a_word
    ),
    _needle("needle_single", "a number for a key", NeedleTask("single", ONE_NEEDLE, 1), has_depth=True),
    _needle("needle_multi_key", "one of 18 keys' numbers", NeedleTask("multi_key", MANY, 16), has_depth=True),
    _needle("needle_multi_value", "all 4 numbers of one of 18 keys", NeedleTask("multi_value", MANY, 2)),
    _needle("needle_multi_query", "the numbers of 4 of 18 keys", NeedleTask("multi_query", MANY, 4)),
    _needle("needle_variable_tracking", "the 4 variables of a chain", NeedleTask("variable_tracking", MANY, 2)),
)
TASKS: dict[str, Task] = {task.name: task for task in _ALL}
