# SPDX-License-Identifier: Apache-2.0
"""Asks every target what its records lack: longer texts later, several at once, one first of those about one text."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

from sglang_tokenselect.evaluation.client import Client, RequestFailed
from sglang_tokenselect.evaluation.settings import Key, Settings
from sglang_tokenselect.evaluation.store import Record, Store
from sglang_tokenselect.evaluation.tasks.registry import TASKS, draw
from sglang_tokenselect.evaluation.tasks.sample import Sample
from sglang_tokenselect.evaluation.tokenizer import TokenCounter

# So many failed requests of a target, and as many as are under way at once, with no answer between them end the run.
MAX_FAILURES_IN_ROW = 4
# Prompts that have so much of their beginning in common are about one text.
SHARED = 0.5

Question = tuple[Key, Sample]
Show = Callable[[Record], None]


class TooManyFailures(Exception):
    """The server does not answer any more; the text has the last reason."""


def ask_targets(
    clients: Mapping[str, Client], drawer: Drawer, store: Store, concurrency: int, keys: Iterable[Key], show: Show
) -> str | None:
    """Asks the targets named in `keys` side by side, each with so many requests at once.

    Returns:
        Why it ended before all was asked; None if it did not.
    """
    try:
        asyncio.run(_ask_targets(clients, drawer, store, concurrency, list(keys), show))
    except* TooManyFailures as failures:
        reason = str(_first_leaf(failures))
    else:
        reason = None
    return reason


async def _ask_targets(
    clients: Mapping[str, Client], drawer: Drawer, store: Store, concurrency: int, keys: list[Key], show: Show
) -> None:
    try:
        async with asyncio.TaskGroup() as tasks:
            for name, client in clients.items():
                target_run = TargetRun(client, drawer, store, concurrency, show)
                tasks.create_task(target_run.ask_all([key for key in keys if key.target == name]))
    finally:
        drawer.close()
        for client in clients.values():
            await client.close()


def _first_leaf(group: BaseExceptionGroup) -> BaseException:
    [first, *_] = group.exceptions
    return _first_leaf(first) if isinstance(first, BaseExceptionGroup) else first


class Drawer:
    """Draws samples in a thread, one at a time, since a tokenizer need not be safe for several."""

    def __init__(self, settings: Settings, count_tokens: TokenCounter) -> None:
        self._settings = settings
        self._count_tokens = count_tokens
        self._pool = ThreadPoolExecutor(max_workers=1)

    def draw(self, key: Key) -> Sample:
        """
        Raises:
            ValueError: the length has no room for the task.
        """
        task, length, count_tokens = TASKS[key.task], key.length, self._count_tokens.whole
        if task.suite == "needle":
            # It adds up counts of sentences. The others count whole texts, and cwe's lists follow the full length.
            length, count_tokens = length - self._count_tokens.added, self._count_tokens
        return draw(task, length, key.seed, key.index, count_tokens, self.depth(key))

    def depth(self, key: Key) -> float | None:
        return self._settings.depth(key.index) if TASKS[key.task].has_depth else None

    async def groups(self, keys: Iterable[Key]) -> AsyncIterator[list[Question]]:
        """Questions that follow each other and share a text, together."""
        loop, groups = asyncio.get_running_loop(), group_by_text((key, self.draw(key)) for key in in_order(keys))
        while group := await loop.run_in_executor(self._pool, next, groups, None):
            yield group

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


class TargetRun:
    """All questions to one target."""

    def __init__(self, client: Client, drawer: Drawer, store: Store, concurrency: int, show: Show) -> None:
        self._client = client
        self._drawer = drawer
        self._store = store
        self._show = show
        self._requests = asyncio.Semaphore(concurrency)
        # Each has a request under way or waiting, so more of them would only hold drawn texts in memory.
        self._groups = asyncio.Semaphore(concurrency)
        self._max_failures = MAX_FAILURES_IN_ROW + concurrency
        self._failures = 0

    async def ask_all(self, keys: Iterable[Key]) -> None:
        """
        Raises:
            TooManyFailures: as an ExceptionGroup of it.
        """
        async with asyncio.TaskGroup() as tasks:
            async for group in self._drawer.groups(keys):
                await self._groups.acquire()
                tasks.create_task(self._ask_group(group))

    async def _ask_group(self, group: list[Question]) -> None:
        """The first alone: it brings the text into the server's cache, where the others find it."""
        try:
            first, *others = group
            await self._ask(*first)
            async with asyncio.TaskGroup() as tasks:
                for key, sample in others:
                    tasks.create_task(self._ask(key, sample))
        finally:
            self._groups.release()

    async def _ask(self, key: Key, sample: Sample) -> None:
        asked = {**key._asdict(), "depth": self._drawer.depth(key), "answers": sample.answers}
        async with self._requests:
            try:
                reply = await self._client.ask(sample)
            except RequestFailed as failure:
                self._add(Record(**asked, error=str(failure)))
                self._count_failure(key, failure)
                return
        self._failures = 0
        self._add(Record(**asked, **vars(reply), score=TASKS[key.task].score(reply.prediction, sample.answers)))

    def _count_failure(self, key: Key, failure: RequestFailed) -> None:
        self._failures += 1
        if self._failures == self._max_failures:
            raise TooManyFailures(f"{key.target}: {self._failures} requests in a row failed, the last with: {failure}")

    def _add(self, record: Record) -> None:
        self._store.add(record)
        self._show(record)
