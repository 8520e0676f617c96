# SPDX-License-Identifier: Apache-2.0
"""The paper's prefill: one mean query stands for a block (arXiv 2411.02886, section 3.4). Decode is as in `vote`."""

from __future__ import annotations

from sglang_tokenselect.kernels.reference.vote import soft_vote
from sglang_tokenselect.selectors.base import Selector

MEAN = Selector("mean", "the same with one mean query per block", soft_vote, has_kernels=True, votes_once=True)
