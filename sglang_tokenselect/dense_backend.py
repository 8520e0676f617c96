# SPDX-License-Identifier: Apache-2.0
"""SGLang's FlashInfer backend, for forwards and layers in which every token is attended to."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from sglang.srt.layers.attention.flashinfer_backend import FlashInferAttnBackend

from sglang_tokenselect.runner import Graph


class DenseBackend(FlashInferAttnBackend):
    """As SGLang's, exact for models with a soft cap of the logits or sliding windows, and for scaled keys and values.

    SGLang hands the cap to each run but not to the plan, which is where FlashInfer chooses between a kernel that caps
    and one that does not; so its models with a cap run without it. And its prefill over the new tokens alone forgets
    the window, which the one over the paged pool (`use_paged`) has. Where it merges new tokens with a prefix, 0.5.17
    forgets the prefix's scales, which `use_paged` has too.
    """

    def __init__(self, model_runner: Any, logit_cap: float, is_scaled: bool) -> None:
        """
        Args:
            logit_cap: of all layers, 0 for none.
            is_scaled: keys or values are stored by a scale other than 1.
        """
        self._logit_cap = logit_cap
        super().__init__(model_runner)
        self.use_paged: bool = self.use_paged or model_runner.sliding_window_size is not None or is_scaled
        for wrapper in (*self.decode_wrappers, *self.prefill_wrappers_paged, self.prefill_wrapper_ragged):
            self._plan_with_cap(wrapper)

    def reserve_graph_rows(self, max_rows: int, longest: int) -> None:
        """Memory for CUDA graphs of up to `max_rows` requests of up to `longest` tokens; earlier graphs are gone.

        One slot more for each row: rows that pad a graph have one.
        """
        self.decode_cuda_graph_metadata.clear()
        indices = torch.zeros(max_rows * (longest + 1), dtype=torch.int32, device=self.workspace_buffer.device)
        # Among what prefill needs are masks of max_rows * context_len bytes, for speculative decoding alone.
        self.skip_prefill = True
        self.init_cuda_graph_state(max_rows, max_rows, kv_indices_buf=indices)
        self.skip_prefill = False

    def begin(self, forward_batch: Any, graph: Graph) -> None:
        """Plans a forward."""
        if graph is Graph.NONE:
            self.init_forward_metadata(forward_batch)
            return
        # Of the graphs of one batch size, the first to be captured makes the wrappers that both use.
        is_first = forward_batch.batch_size not in self.decode_cuda_graph_metadata
        self.init_forward_metadata_out_graph(forward_batch, in_capture=graph is Graph.CAPTURE and is_first)

    def _create_decode_wrappers(self, bs: int, num_tokens: int) -> list:
        wrappers = super()._create_decode_wrappers(bs, num_tokens)
        for wrapper in wrappers:
            self._plan_with_cap(wrapper)
        return wrappers

    def _plan_with_cap(self, wrapper: Any) -> None:
        if self._logit_cap:
            wrapper.begin_forward = partial(wrapper.begin_forward, logits_soft_cap=self._logit_cap)
