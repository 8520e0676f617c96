# SPDX-License-Identifier: Apache-2.0
"""TokenSelect: soft vote of the heads, in prefill by the mean queries of sub-blocks."""

from __future__ import annotations

from sglang_tokenselect.kernels.reference.vote import soft_vote
from sglang_tokenselect.selectors.base import Selector

VOTE = Selector("vote", "soft vote of the heads", soft_vote, has_kernels=True)
