# SPDX-License-Identifier: Apache-2.0
"""The effort of decode steps while the server runs: the policy's level, unless the quality guard refuses it.

Pure Python without a clock: the same calls give the same efforts. The scheduler calls it once per decode step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from statistics import median
from threading import Lock
from typing import Any

from sglang_tokenselect.config import ConfigError, TokenSelectConfig
from sglang_tokenselect.effort import LOWEST_LEVEL, Effort, effort_at, highest_level
from sglang_tokenselect.policies import POLICIES, Load

RUNTIME_OPTIONS = ("policy", "level", "itl_target_ms", "load_requests", "load_wait_ms", "min_budget", "min_mass")
"""Options that can be changed while the server runs."""

WINDOW = 16
"""Gaps between decode steps in one median."""
SKIPPED = 2
"""Gaps left out after a change: with overlap scheduling, the step in flight was launched before it."""
MIN_SAMPLES = 4
"""Samples of the mass before the guard judges an effort."""
MASS_SAMPLES = 8
"""The mass is the plain mean of up to so many samples; of more, a running mean in which a new one has weight 1/8."""
HOLD = 4096
"""Decode steps that a level stays refused; then one more level is allowed every so many steps."""


class GapWindow:
    """Gaps between decode steps, in seconds; their median, once per WINDOW of them.

    A median, because prefills of other requests stall some steps, and no effort level can help that.
    """

    def __init__(self) -> None:
        self.itl: float | None = None
        self._gaps: list[float] = []
        self._to_skip = 0

    def restart(self) -> None:
        """The effort has changed."""
        self._gaps.clear()
        self._to_skip = SKIPPED

    def forget(self) -> None:
        """Nothing runs, so none of the next gaps has to do with what was."""
        self._gaps.clear()
        self._to_skip = 0
        self.itl = None

    def add(self, gap: float | None) -> float | None:
        """The median, if this gap completes a window."""
        if gap is None:
            return None
        if self._to_skip:
            self._to_skip -= 1
            return None
        self._gaps.append(gap)
        if len(self._gaps) < WINDOW:
            return None
        self.itl = median(self._gaps)
        self._gaps.clear()
        return self.itl


class QualityGuard:
    """Refuses levels at which the chosen tokens hold too little of the candidates' attention.

    Attributes:
        cheapest: the cheapest level that is allowed.
        mass: running mean of the samples at the present effort, 0 to 1; None without any.
    """

    def __init__(self, config: TokenSelectConfig) -> None:
        self.cheapest = LOWEST_LEVEL
        self.mass: float | None = None
        self._num_samples = 0
        self._hold = 0
        self._min_mass = config.min_mass
        self._highest = highest_level(config)

    def require(self, min_mass: float | None) -> None:
        """Clears the refusals, which were made by another measure, if this one is new."""
        if min_mass != self._min_mass:
            self._min_mass = min_mass
            self.cheapest = LOWEST_LEVEL

    def restart(self) -> None:
        """The effort has changed."""
        self.mass = None
        self._num_samples = 0

    def note(self, share: float, level: int) -> None:
        self._num_samples += 1
        mean = self.mass or 0.0
        self.mass = mean + (share - mean) / min(self._num_samples, MASS_SAMPLES)
        if self._min_mass is not None and self._num_samples >= MIN_SAMPLES and self.mass < self._min_mass:
            self.cheapest = max(level - 1, self._highest)
            self._hold = HOLD

    def step(self) -> None:
        """Once per decode step, before its level is chosen."""
        if self.cheapest == LOWEST_LEVEL:
            return
        if self._hold == 0:
            self.cheapest += 1
            self._hold = HOLD
        self._hold -= 1


class Controller:
    """Chooses the effort of every decode step.

    All but `configure` and `config` belong to the scheduler's thread.

    Attributes:
        effort: in force.
    """

    def __init__(self, config: TokenSelectConfig) -> None:
        self._configuring = Lock()
        self._latest = config
        self._guard = QualityGuard(config)
        self._window = GapWindow()
        self._adopt(config)
        self.effort = self._efforts[self._policy.rest()]

    @property
    def config(self) -> TokenSelectConfig:
        """As configured now; in force from the next step on."""
        return self._latest

    @property
    def itl(self) -> float | None:
        """Seconds: median gap between decode steps in the last full window; None without one since the last rest."""
        return self._window.itl

    @property
    def mass(self) -> float | None:
        """Share of the candidates' attention that the chosen tokens hold: running mean at the present effort."""
        return self._guard.mass

    @property
    def cheapest(self) -> int:
        """The cheapest level that the quality guard allows."""
        return self._guard.cheapest

    def configure(self, changes: Mapping[str, Any]) -> TokenSelectConfig:
        """Changes some of RUNTIME_OPTIONS; the next step's policy starts anew from the present level. From any thread.

        Raises:
            ConfigError: an option that cannot be changed, or a value that is not allowed. Nothing is changed then.
        """
        for name in changes:
            if name not in RUNTIME_OPTIONS:
                raise ConfigError("option", f"one of {', '.join(RUNTIME_OPTIONS)}", name)
        with self._configuring:
            self._latest = replace(self._latest, **changes)
            return self._latest

    def observe(self, load: Load) -> Effort | None:
        """Once per decode step, before its launch: the effort from this step on, if it changes."""
        self._notice_config()
        self._guard.step()
        itl = self._window.add(load.gap)
        return self._change(self._policy.choose(max(self.effort.level, 0), load, itl))

    def rest(self) -> Effort | None:
        """Nothing runs or waits, so the next request finds the policy's best level: the effort, if it changes."""
        self._notice_config()
        effort = self._change(self._policy.rest())
        self._window.forget()
        return effort

    def note_mass(self, share: float) -> None:
        """A sample, 0 to 1, at the present effort. If it makes the guard object, the next step has another level."""
        if 0 <= share <= 1:  # NaN is what a model of NaNs gives
            self._guard.note(share, self.effort.level)

    def _notice_config(self) -> None:
        latest = self._latest
        if latest is not self._adopted:
            self._adopt(latest)

    def _adopt(self, config: TokenSelectConfig) -> None:
        self._adopted = config
        self._policy = POLICIES[config.policy](config)
        self._guard.require(config.min_mass)
        self._efforts = {level: effort_at(config, level) for level in range(highest_level(config), LOWEST_LEVEL + 1)}

    def _change(self, level: int) -> Effort | None:
        effort = self._efforts[min(level, self._guard.cheapest)]
        if effort == self.effort:
            return None
        self.effort = effort
        self._window.restart()
        self._guard.restart()
        return effort
