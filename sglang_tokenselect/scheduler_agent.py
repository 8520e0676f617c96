# SPDX-License-Identifier: Apache-2.0
"""Beside SGLang's scheduler: sees its load, has the controller set the effort, tells the outside about it.

Under tensor parallelism only the first rank looks at clocks, at the device's samples and at commands from outside, and
only it decides. A decision travels with the requests that SGLang broadcasts to all ranks, so each applies it before the
same step.
"""

from __future__ import annotations

import time
from typing import Any

from sglang_tokenselect import flags
from sglang_tokenselect.controller import Controller, Load
from sglang_tokenselect.effort import Effort
from sglang_tokenselect.runner import Runner
from sglang_tokenselect.snapshot import Reading
from sglang_tokenselect.telemetry import Telemetry

PERIOD = 1.0
"""Seconds between two telemetry messages, and between two looks at an idle server."""


class SchedulerAgent:
    """One per scheduler process."""

    def __init__(self, scheduler: Any, runner: Runner, *, is_leader: bool) -> None:
        """
        Args:
            is_leader: this rank receives the requests, and decides.
        """
        config = flags.attached(scheduler.server_args)
        self.controller = Controller(config)
        self._scheduler, self._runner = scheduler, runner
        self._decided: Effort | None = None
        self._last_decode: float | None = None
        self._next_tick = time.monotonic() + PERIOD
        self._is_sorted = _sorts_its_queue(scheduler.server_args)
        self._telemetry = Telemetry.start(scheduler, self.controller) if is_leader else None
        self._choose_samples()
        runner.set_effort(self.controller.effort)

    def observe(self, batch: Any) -> None:
        """Called right before each forward; on the first rank, a decode step is what the controller decides by."""
        if self._telemetry is None or not batch.forward_mode.is_decode():
            return
        now = time.perf_counter()
        for share, level in self._runner.take_masses():
            if level == self.controller.effort.level:  # one in flight when the level changed judges another
                self.controller.note_mass(share)
        gap = None if self._last_decode is None else now - self._last_decode
        self._last_decode = now
        self._decide(self.controller.observe(self._load(len(batch.reqs), gap, now)))

    def deliver(self, received: list[Any]) -> None:
        """Called in each turn of the scheduler's loop on the first rank, before its requests are broadcast."""
        scheduler = self._scheduler
        if self._telemetry is None:
            return
        if scheduler.last_batch is None and scheduler.running_batch.is_empty() and not scheduler.waiting_queue:
            self._last_decode = None
            self._decide(self.controller.rest())
        if self._decided is not None:
            received.append(self._decided)
            self._decided = None
        if time.monotonic() >= self._next_tick:
            self._next_tick = time.monotonic() + PERIOD
            self._choose_samples()
            if self._telemetry.is_watched:
                self._runner.refresh_counters()
                self._telemetry.send(self._reading())

    def accept(self, received: list[Any]) -> list[Any] | None:
        """Called on every rank with what was broadcast: follows decisions, and returns the rest if there were any."""
        decisions = [item for item in received if type(item) is Effort]
        if not decisions:
            return None
        self._runner.set_effort(decisions[-1])
        return [item for item in received if type(item) is not Effort]

    def _decide(self, effort: Effort | None) -> None:
        if effort is not None and self._telemetry is not None:
            self._decided = effort
            self._telemetry.send_change(self._reading())

    def _load(self, num_running: int, gap: float | None, now: float) -> Load:
        queue = self._scheduler.waiting_queue
        first = queue if self._is_sorted else queue[:1]
        entered = min((req.time_stats.wait_queue_entry_time or now for req in first), default=now)
        return Load(
            num_running=num_running,
            oldest_wait=now - entered,
            kv_usage=self._kv_usage(),
            gap=gap,
        )

    def _choose_samples(self) -> None:
        """Only where somebody looks: a sample is a dense pass."""
        is_guarded = self.controller.config.min_mass is not None
        self._runner.samples_mass = self._telemetry is not None and (self._telemetry.is_watched or is_guarded)

    def _kv_usage(self) -> float:
        scheduler = self._scheduler
        free = scheduler.token_to_kv_pool_allocator.available_size() + scheduler.tree_cache.evictable_size()
        return 1.0 - free / scheduler.max_total_num_tokens

    def _reading(self) -> Reading:
        scheduler = self._scheduler
        return Reading(
            running=len(scheduler.running_batch.reqs),
            waiting=len(scheduler.waiting_queue),
            kv_usage=self._kv_usage(),
            counters=self._runner.counters.to_dict(),
        )


def _sorts_its_queue(server_args: Any) -> bool:
    """Whether another than the first request of the queue may have waited longest."""
    return server_args.schedule_policy != "fcfs" or server_args.enable_priority_scheduling
