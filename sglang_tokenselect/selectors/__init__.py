# SPDX-License-Identifier: Apache-2.0
"""Who is chosen: TokenSelect's vote, and simpler policies to compare it with. One registry, one file a policy."""

from __future__ import annotations

from sglang_tokenselect.selectors.base import Selector
from sglang_tokenselect.selectors.mean import MEAN
from sglang_tokenselect.selectors.page import PAGE
from sglang_tokenselect.selectors.vote import VOTE
from sglang_tokenselect.selectors.window import WINDOW

SELECTORS: dict[str, Selector] = {selector.name: selector for selector in (VOTE, MEAN, PAGE, WINDOW)}

__all__ = ["SELECTORS", "Selector"]
