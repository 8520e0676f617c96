# SPDX-License-Identifier: Apache-2.0
"""What a policy of selection is: a score for each candidate. Ranking, budget and window are the same for all."""

from __future__ import annotations

from dataclasses import dataclass

from sglang_tokenselect.kernels.reference.vote import Score


@dataclass(frozen=True)
class Selector:
    """
    Attributes:
        name: value of `--tokenselect-selector`.
        summary: for the help text.
        score: of the candidates, for each row of queries.
        has_kernels: the Triton kernels compute it; otherwise a GPU runs it in PyTorch, request by request and without
            CUDA graphs.
        votes_once: one mean query per block of a prefill, whatever `sub_block`.
    """

    name: str
    summary: str
    score: Score
    has_kernels: bool = False
    votes_once: bool = False
