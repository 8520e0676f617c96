# SPDX-License-Identifier: Apache-2.0
"""What is asked of whom: the shipped checkpoint behind servers that differ in one option each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sglang_tokenselect.selectors import SELECTORS

TASKS = ("needle_multi_key", "needle_multi_value", "needle_multi_query", "needle_variable_tracking")
LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
LONG = 32768
SEEDS = (0, 1, 2)
BUDGETS = (256, 512, 1024, 2048, 3776)
"""With sink 64, local 128 and a block of 128 the last fills the 4,096 positions that the checkpoint was trained at."""
WINDOWS = 64 + 128
"""Sink and local tokens of the needle server."""
BUDGET = 448
"""Of the experiments that vary something else: 640 tokens attended."""
CONTEXT_LENGTH = 140_000
DENSE = "dense"
NO_KERNELS = ("--cuda-graph-backend-decode", "disabled")


@dataclass(frozen=True)
class Variant:
    """One server and what it is asked.

    Attributes:
        name: of the row; what differs.
        flags: beside those of the needle server.
        budgets: own options of requests, one after the other; (): the server's.
        samples: of each task, length and seed; half as many of lengths beyond LONG.
    """

    name: str
    flags: tuple[str, ...] = ()
    budgets: tuple[int, ...] = ()
    lengths: tuple[int, ...] = LENGTHS
    samples: int = 8

    def samples_at(self, length: int) -> int:
        return self.samples if length <= LONG else (self.samples + 1) // 2

    @property
    def is_dense(self) -> bool:
        return self.name == DENSE


def options(**values: object) -> tuple[str, ...]:
    """Of TokenSelect, as flags."""
    return tuple(
        part for name, value in values.items() for part in (f"--tokenselect-{name.replace('_', '-')}", str(value))
    )


def _policies() -> list[Variant]:
    """Who is chosen, at equal numbers of attended tokens."""
    variants = [Variant(DENSE, lengths=LENGTHS[:2], samples=16)]
    for selector in SELECTORS.values():
        flags = options(selector=selector.name, max_budget=max(BUDGETS))
        variants.append(Variant(selector.name, flags + (() if selector.has_kernels else NO_KERNELS), BUDGETS))
    return variants


def _sub_blocks() -> list[Variant]:
    """How many queries of a prefill cast a vote together."""
    return [
        Variant(f"sub_block {size}", options(budget=BUDGET, sub_block=size), lengths=(8192, 32768))
        for size in (1, 2, 4, 8, 16, 32, 64, 128)
    ]


def _reuse() -> list[Variant]:
    """When a decode query reuses an earlier selection."""
    thetas = [
        Variant(f"theta {theta:g}", options(budget=BUDGET, theta=theta), lengths=(8192, 32768))
        for theta in (1.1, 0.95, 0.9, 0.8, 0.6, 0.3)
    ]
    steps = [
        Variant(f"max_reuse {steps}", options(budget=BUDGET, theta=-1, max_reuse=steps), lengths=(8192, 32768))
        for steps in (2, 4, 8, 16, 64)
    ]
    return thetas + steps


EXPERIMENTS = {"policies": _policies, "sub_block": _sub_blocks, "reuse": _reuse}


def chosen(
    experiment: str, names: Sequence[str] | None, lengths: Sequence[int] | None, samples: int | None
) -> list[Variant]:
    """The experiment's variants; any of these narrows them."""
    variants = [v for v in EXPERIMENTS[experiment]() if names is None or v.name in names]
    narrowed = []
    for v in variants:
        kept = tuple(length for length in v.lengths if lengths is None or length in lengths)
        if kept:
            narrowed.append(Variant(v.name, v.flags, v.budgets, kept, samples or v.samples))
    return narrowed
