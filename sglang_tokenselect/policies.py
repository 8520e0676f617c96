# SPDX-License-Identifier: Apache-2.0
"""Policies: which effort level a decode step should have, from the load or from the time between tokens. Pure Python.

A policy is told the level in force instead of keeping its own. So what the quality guard refuses cannot pile up in it,
and a policy that is started anew goes on from the present level. Its best level is 0; those below are the guard's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from sglang_tokenselect.config import TokenSelectConfig
from sglang_tokenselect.effort import LEVELS, LOWEST_LEVEL

PATIENCE = 32
"""Policy load: consecutive decode steps of low pressure before one level better."""
KV_USAGE_RAMP = (0.8, 0.98)
"""Shares of the KV pool in use at which its pressure is 0 and 1: beyond, SGLang soon retracts requests."""

FAR_ABOVE = 1.5
"""Policy slo: a median over this multiple of the target goes two levels cheaper at once."""
RAISE_BELOW = 0.85
"""Policy slo: share of the target below which the median must stay before one level better."""
MIN_PATIENCE, MAX_PATIENCE = 2, 64
"""Policy slo: windows below RAISE_BELOW before a raise; doubled by each raise that fails, halved by one that holds."""
MIN_TRIAL = 4
"""Policy slo: windows that a raise is on trial, at least; otherwise as many as its patience."""


@dataclass(frozen=True)
class Load:
    """What the scheduler sees right before it launches a decode step.

    Attributes:
        num_running: requests that this step decodes.
        oldest_wait: seconds that the first request in the queue has waited; 0.0 if none waits.
        kv_usage: share of the KV pool in use, 0 to 1.
        gap: seconds since the decode step before was launched, prefills in between included; None if the server had
            nothing to decode before.
    """

    num_running: int
    oldest_wait: float
    kv_usage: float
    gap: float | None


class Policy(Protocol):
    """Chooses a level for each decode step."""

    def rest(self) -> int: ...

    def choose(self, level: int, load: Load, itl: float | None) -> int: ...


class FixedPolicy:
    """Always the configured level."""

    def __init__(self, config: TokenSelectConfig) -> None:
        self._level = config.level

    def choose(self, level: int, load: Load, itl: float | None) -> int:
        return self._level

    def rest(self) -> int:
        return self._level


class LoadPolicy:
    """Cheaper as soon as the pressure reaches a level, better once it has long been low.

    Pressure is counted in levels: level k is reached at k. It is left, one level at a time, after PATIENCE steps in a
    row under k - 0.5, so noise between k - 0.5 and k + 1 changes nothing.
    """

    def __init__(self, config: TokenSelectConfig) -> None:
        self._requests = config.load_requests
        self._wait_ms = config.load_wait_ms
        self._calm = 0

    def choose(self, level: int, load: Load, itl: float | None) -> int:
        pressure = self._pressure(load)
        self._calm = self._calm + 1 if pressure < level - 0.5 else 0
        if pressure >= level + 1:
            return int(pressure)
        if self._calm == PATIENCE:
            self._calm = 0
            return level - 1
        return level

    def rest(self) -> int:
        return 0

    def _pressure(self, load: Load) -> float:
        """0 to LOWEST_LEVEL: the greatest of what running requests, the wait and the KV pool each ask for."""
        low, high = KV_USAGE_RAMP
        share = max(
            load.num_running / self._requests,
            1000 * load.oldest_wait / self._wait_ms,
            (load.kv_usage - low) / (high - low),
        )
        return LOWEST_LEVEL * min(share, 1.0)


class SloPolicy:
    """Holds the median time between tokens at the target, with the best level that does.

    Levels are coarse: the best that holds may be far below the target and the next far above, so the policy has to try.
    Each level has its own patience, the windows that it is waited for: what is learnt of one that fails is not
    unlearnt by another that holds on the way there. At constant load, tries become as rare as one in MAX_PATIENCE
    windows.
    """

    def __init__(self, config: TokenSelectConfig) -> None:
        self._target = config.itl_target_ms / 1000  # type: ignore[operator]  # policy slo is refused without one
        self._patience = [MIN_PATIENCE] * len(LEVELS)
        self._calm = 0  # windows in a row below RAISE_BELOW
        self._trial = 0  # windows that the last raise has yet to hold
        self._running = 0  # most requests in a step since the last window ended
        self._failed_running: int | None = None  # the same when a raise failed

    def choose(self, level: int, load: Load, itl: float | None) -> int:
        """
        Args:
            level: in force, but not below 0.
            itl: seconds, the median of the window that this step ends; None within a window.
        """
        self._running = max(self._running, load.num_running)
        if itl is None:
            return level
        self._notice_fall()
        chosen = self._missed(level, itl) if itl > self._target else self._held(level, itl)
        self._running = 0
        return chosen

    def rest(self) -> int:
        """Keeps the patience: whether the load fell is seen by the requests that come next."""
        self._trial = self._running = 0
        return 0

    def _notice_fall(self) -> None:
        """With at most 3/4 of the requests, what failed may hold: it is tried again soon."""
        if self._failed_running is not None and 4 * self._running <= 3 * self._failed_running:
            self._patience = [MIN_PATIENCE] * len(LEVELS)
            self._failed_running = None

    def _missed(self, level: int, itl: float) -> int:
        if self._trial:
            self._patience[level] = min(2 * self._patience[level], MAX_PATIENCE)
            self._failed_running = self._running
        self._calm = self._trial = 0
        return min(level + (2 if itl > FAR_ABOVE * self._target else 1), LOWEST_LEVEL)

    def _held(self, level: int, itl: float) -> int:
        if self._trial:
            self._trial -= 1
            if self._trial == 0:
                self._patience[level] = max(self._patience[level] // 2, MIN_PATIENCE)
        self._calm = self._calm + 1 if itl < RAISE_BELOW * self._target else 0
        if level == 0 or self._calm < self._patience[level - 1]:
            return level
        self._calm = 0
        self._trial = max(self._patience[level - 1], MIN_TRIAL)
        return level - 1


POLICIES: dict[str, Callable[[TokenSelectConfig], Policy]] = {
    "fixed": FixedPolicy,
    "load": LoadPolicy,
    "slo": SloPolicy,
}
