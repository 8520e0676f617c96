# SPDX-License-Identifier: Apache-2.0
"""Effort levels: how much a decode step may read, from the configured budget down. Pure Python.

Level 0 is what the configuration says. Levels above 0 are cheaper: less similar queries reuse a selection, since
without reuse a step's time goes into scoring and not into the chosen tokens, and budgets shrink. The cheapest reuses
whatever the query, which costs answers (README, "Effort levels"); requests then select as soon as they exceed their
window, for then it pays at any length. Levels below 0 have larger budgets; only the quality guard goes there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang_tokenselect.config import TokenSelectConfig


@dataclass(frozen=True)
class Level:
    """A rung of the ladder, relative to the configuration.

    Attributes:
        budget_factor: of the configured budget.
        most_theta: upper bound of theta; -1 reuses at any similarity.
        reuse_factor: of the configured max_reuse.
        keeps_min_len: requests up to the configured min_len attend to everything; else only those within their window.
    """

    budget_factor: float
    most_theta: float
    reuse_factor: int = 1
    keeps_min_len: bool = True


LEVELS = (
    Level(1.0, float("inf")),
    Level(1.0, 0.8),
    Level(0.5, 0.6),
    Level(0.5, 0.3),
    Level(0.5, -1.0, reuse_factor=2, keeps_min_len=False),
)
LOWEST_LEVEL = len(LEVELS) - 1
MOST_REUSE = 2**31 - 1
"""As the device counts."""


@dataclass(frozen=True)
class Effort:
    """What decode steps work with from the next one on.

    Attributes:
        level: 0 as configured, above it cheaper, below it with a larger budget.
        budget: tokens chosen by vote, of requests that bring no budget of their own.
        min_len: tokens up to which such requests attend to everything, even if their window is smaller.
        theta, max_reuse: see TokenSelectConfig.
    """

    level: int
    budget: int
    min_len: int
    theta: float
    max_reuse: int


def highest_level(config: TokenSelectConfig) -> int:
    """0, or as many below as the budget can be doubled before it is `max_budget`, the last time in part."""
    level, budget = 0, config.budget
    while 0 < budget < config.largest_budget:
        level, budget = level - 1, 2 * budget
    return level


def effort_at(config: TokenSelectConfig, level: int) -> Effort:
    """The effort of one level; its budget stays within `min_budget` and `max_budget`.

    Args:
        level: highest_level(config) to LOWEST_LEVEL.
    """
    if not highest_level(config) <= level <= LOWEST_LEVEL:
        raise ValueError(f"level: expected {highest_level(config)} to {LOWEST_LEVEL}, got {level}")
    rung = LEVELS[max(level, 0)]
    factor = 2**-level if level < 0 else rung.budget_factor
    budget = min(max(round(config.budget * factor), config.min_budget), config.largest_budget)
    min_len = config.window.min_len if rung.keeps_min_len else 0
    max_reuse = min(config.max_reuse * rung.reuse_factor, MOST_REUSE)
    return Effort(level, budget, min_len, min(config.theta, rung.most_theta), max_reuse)
