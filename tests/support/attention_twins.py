# SPDX-License-Identifier: Apache-2.0
"""Naive twins of flashinfer_attention.py, for machines without a GPU: the same calls, attention in PyTorch."""

from __future__ import annotations

import torch

from sglang_tokenselect.kernels.reference.attention import attend_positions
from sglang_tokenselect.kernels.reference.positions import Rope
from sglang_tokenselect.runner import LayerInput
from sglang_tokenselect.slot_lists import SlotLists


class _Twin:
    def __init__(self, logit_cap: float = 0.0, rope: Rope | None = None) -> None:
        self._logit_cap, self._rope = logit_cap, rope

    def _plan(self, qo_indptr: torch.Tensor, lists: SlotLists) -> None:
        self._spans = list(zip(qo_indptr.tolist()[:-1], qo_indptr.tolist()[1:], strict=True))
        self._lists = lists

    def run(self, query: torch.Tensor, layer: LayerInput) -> torch.Tensor:
        out = torch.empty_like(query)
        bounds = self._lists.kv_indptr_cpu.tolist()
        for (begin, end), lo, hi in zip(self._spans, bounds[:-1], bounds[1:], strict=True):
            kv = layer.request_kv(self._lists.kv_indices[lo:hi])
            span = query[begin:end].float()
            attended = attend_positions(
                span, kv, slice(None), scaling=layer.scaling, logit_cap=self._logit_cap, rope=self._rope
            )
            out[begin:end] = attended.to(out.dtype)
        return out


class DecodeTwin(_Twin):
    """Of DecodeAttention."""

    def plan(self, lists: SlotLists) -> None:
        self._plan(torch.arange(len(lists) + 1), lists)

    plan_capture = plan_replay = plan

    def forget_graphs(self) -> None:
        """It knows none."""


class PrefillTwin(_Twin):
    """Of PrefillAttention."""

    def plan(self, qo_indptr_cpu: torch.Tensor, lists: SlotLists) -> None:
        self._plan(qo_indptr_cpu, lists)
