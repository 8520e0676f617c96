# SPDX-License-Identifier: Apache-2.0
"""What a request asks for: `custom_params = {"tokenselect": {"budget": 4096}}`, or `{"dense": true}` under that key."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from sglang_tokenselect.config import TokenSelectConfig
from sglang_tokenselect.kernels.reference.window import Window

KEY = "tokenselect"
SALT = f"|{KEY}:"
"""Begins a cache salt; no request's own `extra_key` may hold it."""


@dataclass(frozen=True)
class RequestOptions:
    """Options of one request, checked. They hold for its prefill and its decode steps, at any effort level.

    Attributes:
        budget: tokens chosen by vote; None: as the server's configuration and effort level say.
        is_dense: attend to everything.
    """

    budget: int | None = None
    is_dense: bool = False

    @property
    def cache_salt(self) -> str:
        """Keeps its keys apart in the radix cache: they depend on what the tokens before attended to."""
        return SALT + ("dense" if self.is_dense else f"budget={self.budget}")

    def window(self, config: TokenSelectConfig) -> Window:
        if self.is_dense:
            return replace(config.window, min_len=sys.maxsize)
        return config.window if self.budget is None else replace(config.window, budget=self.budget)


def parse_options(custom_params: Any, largest_budget: int) -> RequestOptions | None:
    """The options in a request's `custom_params`; None if it has none, or asks for nothing.

    Raises:
        ValueError: an unknown option or a bad value, as name, expected, got.
    """
    if not isinstance(custom_params, Mapping) or KEY not in custom_params:
        return None
    options = custom_params[KEY]
    if not isinstance(options, Mapping) or not options.keys() <= {"budget", "dense"}:
        raise _bad("", '{"budget": TOKENS} or {"dense": true}', options)
    budget, is_dense = options.get("budget"), options.get("dense", False)
    if not isinstance(is_dense, bool):
        raise _bad(".dense", "true or false", is_dense)
    if budget is not None and (type(budget) is not int or not 0 <= budget <= largest_budget):
        raise _bad(".budget", f"an integer from 0 to {largest_budget} (--tokenselect-max-budget)", budget)
    if is_dense and budget is not None:
        raise _bad("", "a budget or dense, not both", options)
    return RequestOptions(budget, is_dense) if is_dense or budget is not None else None


def _bad(name: str, expected: str, got: Any) -> ValueError:
    shown = repr(got)
    return ValueError(f"custom_params.{KEY}{name}: expected {expected}, got {shown[:200]}")
