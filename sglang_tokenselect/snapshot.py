# SPDX-License-Identifier: Apache-2.0
"""What a server tells about its attention at one moment: effort, load, and what was attended to."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from sglang_tokenselect.effort import LOWEST_LEVEL, highest_level

if TYPE_CHECKING:
    from sglang_tokenselect.controller import Controller


@dataclass(frozen=True)
class Reading:
    """What the scheduler knows and the controller does not.

    Attributes:
        running, waiting: requests.
        kv_usage: share of the KV pool in use, 0 to 1.
        counters: `Counters.to_dict()`.
    """

    running: int
    waiting: int
    kv_usage: float
    counters: Mapping[str, int]


@dataclass(frozen=True)
class Snapshot:
    """A telemetry message. Shares are 0 to 1; None is what is not known.

    Attributes:
        time: Unix time in seconds.
        policy, itl_target_ms, min_mass: see TokenSelectConfig.
        level, budget, theta, max_reuse: see Effort.
        highest_level, lowest_level: bounds of the level. The lowest is the cheapest and has the largest number.
        itl_ms: median milliseconds between decode steps lately.
        running, waiting, kv_usage, counters: see Reading.
        mass: share of the candidates' attention that the chosen tokens hold.
        level_changes: since the server started.
        attended_share: attended of the cached tokens, since the last periodic snapshot.
        hit_ratio: reuses of the decode queries that selected, since the last periodic snapshot.
    """

    time: float
    policy: str
    level: int
    highest_level: int
    lowest_level: int
    budget: int
    theta: float
    max_reuse: int
    itl_ms: float | None
    itl_target_ms: float | None
    running: int
    waiting: int
    kv_usage: float
    mass: float | None
    min_mass: float | None
    level_changes: int
    attended_share: float | None
    hit_ratio: float | None
    counters: dict[str, int]

    @property
    def tokens_not_read(self) -> int:
        """Cached tokens that decode queries did not attend to."""
        return self.counters.get("cached_tokens", 0) - self.counters.get("attended_tokens", 0)

    def to_dict(self) -> dict[str, Any]:
        """Plain builtins, `tokens_not_read` included."""
        return {**asdict(self), "tokens_not_read": self.tokens_not_read}


class SnapshotTaker:
    """Remembers what the last snapshots were, for what is told as a change since."""

    def __init__(self, controller: Controller) -> None:
        self._controller = controller
        self._level = controller.effort.level
        self._level_changes = 0
        self._counters: Mapping[str, int] = {}

    def take(self, reading: Reading, *, is_periodic: bool) -> Snapshot:
        """
        Args:
            is_periodic: the shares of the snapshots to come are about the time from this one on.
        """
        controller, config, effort = self._controller, self._controller.config, self._controller.effort
        self._level_changes += effort.level != self._level
        self._level = effort.level
        since = {name: value - self._counters.get(name, 0) for name, value in reading.counters.items()}
        if is_periodic:
            self._counters = dict(reading.counters)
        return Snapshot(
            time=time.time(),
            policy=config.policy,
            level=effort.level,
            highest_level=highest_level(config),
            lowest_level=LOWEST_LEVEL,
            budget=effort.budget,
            theta=effort.theta,
            max_reuse=effort.max_reuse,
            itl_ms=None if controller.itl is None else 1000 * controller.itl,
            itl_target_ms=config.itl_target_ms,
            running=reading.running,
            waiting=reading.waiting,
            kv_usage=reading.kv_usage,
            mass=controller.mass,
            min_mass=config.min_mass,
            level_changes=self._level_changes,
            attended_share=_share(since["attended_tokens"], since["cached_tokens"]),
            hit_ratio=_share(since["reuses"], since["votes"] + since["reuses"]),
            counters=dict(reading.counters),
        )


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
