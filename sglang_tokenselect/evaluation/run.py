# SPDX-License-Identifier: Apache-2.0
"""Asks every target what its records lack: longer texts later, several at once, one first of those about one text."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from sglang_tokenselect.evaluation.client import Client, RequestFailed
from sglang_tokenselect.evaluation.drawer import Drawer, Question
from sglang_tokenselect.evaluation.settings import Key
from sglang_tokenselect.evaluation.store import Record, Store
from sglang_tokenselect.evaluation.tasks.registry import TASKS
from sglang_tokenselect.evaluation.tasks.sample import Sample

# So many failed requests of a target, and as many as are under way at once, with no answer between them end the run.
MAX_FAILURES_IN_ROW = 4

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
    reason = None
    try:
        asyncio.run(_ask_targets(clients, drawer, store, concurrency, list(keys), show))
    except* TooManyFailures as failures:
        reason = str(_first_leaf(failures))
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
            async for group in self._drawer.groups(keys, self._refuse):
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
        async with self._requests:
            try:
                reply = await self._client.ask(sample)
            except RequestFailed as failure:
                self._add(key, sample.answers, error=str(failure))
                self._count_failure(key, failure)
                return
        self._failures = 0
        score = TASKS[key.task].score(reply.prediction, sample.answers)
        self._add(key, sample.answers, **vars(reply), score=score)

    def _refuse(self, key: Key, reason: ValueError) -> None:
        """The server has not failed, so the run goes on."""
        self._add(key, (), error=f"not asked; {reason}")

    def _count_failure(self, key: Key, failure: RequestFailed) -> None:
        self._failures += 1
        if self._failures == self._max_failures:
            raise TooManyFailures(f"{key.target}: {self._failures} requests in a row failed, the last with: {failure}")

    def _add(self, key: Key, answers: tuple[str, ...], **outcome: Any) -> None:
        record = Record(*key, depth=self._drawer.depth(key), answers=answers, **outcome)
        self._store.add(record)
        self._show(record)
