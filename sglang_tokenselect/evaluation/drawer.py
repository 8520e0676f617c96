# SPDX-License-Identifier: Apache-2.0
"""Draws the questions in the order in which they are asked, and finds those about one text."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from sglang_tokenselect.evaluation.settings import Key, Settings
from sglang_tokenselect.evaluation.tasks.registry import TASKS, check, draw
from sglang_tokenselect.evaluation.tasks.sample import Sample
from sglang_tokenselect.evaluation.tokenizer import TokenCounter

# Prompts that have so much of their beginning in common are about one text.
SHARED = 0.5

Question = tuple[Key, Sample]
Refuse = Callable[[Key, ValueError], None]


class Drawer:
    """Draws samples in a thread, one at a time, since a tokenizer need not be safe for several."""

    def __init__(self, settings: Settings, count_tokens: TokenCounter) -> None:
        self._settings = settings
        self._count_tokens = count_tokens
        self._pool = ThreadPoolExecutor(max_workers=1)

    def draw(self, key: Key) -> Sample:
        """
        Raises:
            ValueError: the length does not do for the task.
        """
        length, count_tokens = self._room(key)
        return draw(TASKS[key.task], length, key.seed, key.index, count_tokens, self.depth(key))

    def check(self, key: Key) -> None:
        """As `draw`, fast. A few tokens may part them: one key or value has more than another."""
        length, count_tokens = self._room(key)
        check(TASKS[key.task], length, key.seed, key.index, count_tokens)

    def _room(self, key: Key) -> tuple[int, Callable[[str], int]]:
        """Tokens, and what counts them."""
        if TASKS[key.task].suite == "needle":
            # It adds up counts of sentences. The others count whole texts, and cwe's lists follow the full length.
            return key.length - self._count_tokens.added, self._count_tokens
        return key.length, self._count_tokens.whole

    def depth(self, key: Key) -> float | None:
        return self._settings.depth(key.index) if TASKS[key.task].has_depth else None

    async def groups(self, keys: Iterable[Key], refuse: Refuse) -> AsyncIterator[list[Question]]:
        """Questions that follow each other and share a text, together. `refuse` gets those that cannot be drawn."""
        loop = asyncio.get_running_loop()

        def refuse_from_thread(key: Key, error: ValueError) -> None:
            loop.call_soon_threadsafe(refuse, key, error)

        groups = group_by_text(self._questions(in_order(keys), refuse_from_thread))
        while group := await loop.run_in_executor(self._pool, next, groups, None):
            yield group

    def _questions(self, keys: Iterable[Key], refuse: Refuse) -> Iterator[Question]:
        for key in keys:
            try:
                sample = self.draw(key)
            except ValueError as error:
                refuse(key, error)
            else:
                yield key, sample

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


def in_order(keys: Iterable[Key]) -> list[Key]:
    """Keys by length, seed and index, as they are to be asked.

    Questions about one text follow each other: where tasks share texts, those of an index do. A task with a depth has a
    text of its own for each question.
    """
    return sorted(keys, key=lambda key: (key.length, key.seed, TASKS[key.task].has_depth))


def group_by_text(questions: Iterable[Question]) -> Iterator[list[Question]]:
    """Runs of questions whose prompts begin alike. A run is complete when the next question is drawn."""
    group: list[Question] = []
    for key, sample in questions:
        if group and not shares_text(group[0][1].prompt, sample.prompt):
            yield group
            group = []
        group.append((key, sample))
    if group:
        yield group


def shares_text(one: str, other: str) -> bool:
    common = len(os.path.commonprefix((one, other)))
    return common > SHARED * max(len(one), len(other))
