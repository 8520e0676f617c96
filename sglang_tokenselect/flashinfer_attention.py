# SPDX-License-Identifier: Apache-2.0
"""FlashInfer's paged attention over lists of slots: planned once per forward, run in each layer.

A plan depends on the lists' lengths alone, and FlashInfer reads the slots when it runs. So each layer writes its own
selection into the planned buffer before it attends.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from flashinfer import (
    BatchDecodeWithPagedKVCacheWrapper,
    BatchPrefillWithPagedKVCacheWrapper,
    fast_decode_plan,
)

from sglang_tokenselect.model_shape import ModelShape
from sglang_tokenselect.runner import LayerInput
from sglang_tokenselect.slot_lists import SlotLists


@dataclass(frozen=True)
class AttentionSpec:
    """What FlashInfer compiles and plans for.

    Attributes:
        shape: of the model.
        logit_cap: tanh soft cap, 0 for none.
        rope_theta: in compact mode, where FlashInfer rotates the keys by their rank in the list and the queries as the
            last of them; None: queries and keys are rotated already.
    """

    shape: ModelShape
    logit_cap: float = 0.0
    rope_theta: float | None = None

    @property
    def variant(self) -> dict[str, Any]:
        """What a plan and a run must agree on."""
        rotates = self.rope_theta is not None
        return {
            "pos_encoding_mode": "ROPE_LLAMA" if rotates else "NONE",
            "rope_theta": self.rope_theta,
            "logits_soft_cap": self.logit_cap,
        }

    def run_options(self, layer: LayerInput) -> dict[str, Any]:
        """The scales as numbers of the host: a tensor's would be waited for, which no graph can capture."""
        return {**self.variant, "sm_scale": layer.scaling, "k_scale": layer.k_scale, "v_scale": layer.v_scale}

    @property
    def plan_options(self) -> dict[str, Any]:
        return {
            **self.variant,
            "num_qo_heads": self.shape.num_qo_heads,
            "num_kv_heads": self.shape.num_kv_heads,
            "page_size": 1,
            "q_data_type": self.shape.dtype,
            "kv_data_type": self.shape.kv_dtype,
        }


class _PinnedTurns:
    """Two pinned buffers that plans take in turns.

    FlashInfer fills its wrapper's pinned buffer on the host and copies it asynchronously. The scheduler runs up to one
    forward ahead of the device, so the next plan could overwrite a copy that has not begun; the one after cannot.
    """

    def __init__(self, num_bytes: int) -> None:
        self._buffers = cycle([torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True) for _ in range(2)])

    def give_next_to(self, wrapper: Any) -> None:
        wrapper._pin_memory_int_workspace_buffer = next(self._buffers)


class DecodeAttention:
    """Decode on tensor cores, the one path of FlashInfer that stays right at any length when a graph is replayed."""

    def __init__(
        self, spec: AttentionSpec, float_workspace: torch.Tensor, int_workspace: torch.Tensor, max_rows: int
    ) -> None:
        """
        Args:
            float_workspace, int_workspace: uint8; plans of all batch sizes are in the same place, since only one of
                them is run before the next step plans again.
        """
        self._spec = spec
        self._float_workspace, self._int_workspace = float_workspace, int_workspace
        self._turns = _PinnedTurns(int_workspace.numel())
        self._last_page_len = torch.ones(max_rows, dtype=torch.int32, device=float_workspace.device)
        self._last_page_len_cpu = torch.ones(max_rows, dtype=torch.int32)
        self._captured: dict[int, BatchDecodeWithPagedKVCacheWrapper] = {}
        self._eager = self._make_wrapper()
        self._wrapper = self._eager

    def forget_graphs(self) -> None:
        """Before graphs are captured over other buffers."""
        self._captured.clear()

    def plan(self, lists: SlotLists) -> None:
        """For a step that no graph holds."""
        self._wrapper = self._eager
        self._plan_anew(lists)

    def plan_capture(self, lists: SlotLists) -> None:
        """Before a graph is captured over the buffers of `lists`, which all replays then use."""
        batch_size = len(lists)
        if batch_size not in self._captured:
            self._captured[batch_size] = self._make_wrapper(
                use_cuda_graph=True,
                paged_kv_indptr_buffer=lists.kv_indptr,
                paged_kv_indices_buffer=lists.kv_indices,
                paged_kv_last_page_len_buffer=self._last_page_len[:batch_size],
            )
        self._wrapper = self._captured[batch_size]
        self._plan_anew(lists)

    def plan_replay(self, lists: SlotLists) -> None:
        """Before a replay. The device's `kv_indptr` is the caller's to write; nothing waits for the device."""
        batch_size = len(lists)
        self._wrapper = self._captured[batch_size]
        self._turns.give_next_to(self._wrapper)
        fast_decode_plan(
            self._wrapper,
            lists.kv_indptr,
            lists.kv_indices,
            self._last_page_len[:batch_size],
            head_dim=self._spec.shape.head_dim,
            global_override_indptr_cpu=lists.kv_indptr_cpu,
            **self._spec.plan_options,
        )

    def run(self, query: torch.Tensor, layer: LayerInput) -> torch.Tensor:
        """Attention of one layer: [num_rows, num_qo_heads, head_dim], as `query`."""
        return self._wrapper.forward(query, (layer.key_pool, layer.value_pool), **self._spec.run_options(layer))

    def _make_wrapper(self, **graph_options: Any) -> BatchDecodeWithPagedKVCacheWrapper:
        wrapper = BatchDecodeWithPagedKVCacheWrapper(
            self._float_workspace, "NHD", use_tensor_cores=True, backend="fa2", **graph_options
        )
        wrapper._int_workspace_buffer = self._int_workspace
        return wrapper

    def _plan_anew(self, lists: SlotLists) -> None:
        self._turns.give_next_to(self._wrapper)
        self._wrapper.plan(
            lists.kv_indptr_cpu,
            lists.kv_indices[: int(lists.kv_indptr_cpu[-1])],
            self._last_page_len_cpu[: len(lists)],
            head_dim=self._spec.shape.head_dim,
            **self._spec.plan_options,
        )


class PrefillAttention:
    """Prefill, each block of queries as a request of its own: causal, its own tokens last in its list."""

    def __init__(self, spec: AttentionSpec, float_workspace: torch.Tensor) -> None:
        self._spec = spec
        # FlashInfer's kernels for Hopper (fa3) do not rotate, and do not say so when they are asked for by name. "auto"
        # knows that they take no float8 keys.
        backend = "auto" if spec.rope_theta is None else "fa2"
        self._wrapper = BatchPrefillWithPagedKVCacheWrapper(float_workspace, "NHD", backend=backend)
        self._turns = _PinnedTurns(self._wrapper._int_workspace_buffer.numel())

    def plan(self, qo_indptr_cpu: torch.Tensor, lists: SlotLists) -> None:
        """
        Args:
            qo_indptr_cpu: [num_lists + 1] int32 on the host, where each list's queries begin.
        """
        self._turns.give_next_to(self._wrapper)
        self._wrapper.plan(
            qo_indptr_cpu,
            lists.kv_indptr_cpu,
            lists.kv_indices,
            torch.ones(len(lists), dtype=torch.int32),
            head_dim_qk=self._spec.shape.head_dim,
            causal=True,
            **self._spec.plan_options,
        )

    def run(self, query: torch.Tensor, layer: LayerInput) -> torch.Tensor:
        """Attention of one layer: [num_tokens, num_qo_heads, head_dim], as `query`."""
        pools = layer.key_pool, layer.value_pool
        return self._wrapper.forward(query, pools, causal=True, **self._spec.run_options(layer))
