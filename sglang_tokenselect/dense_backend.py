# SPDX-License-Identifier: Apache-2.0
"""SGLang's FlashInfer backend, for forwards and layers in which every token is attended to."""

from __future__ import annotations

from functools import partial
from typing import Any

from sglang.srt.layers.attention.flashinfer_backend import FlashInferAttnBackend


class DenseBackend(FlashInferAttnBackend):
    """As SGLang's, exact for models with a soft cap of the logits or with sliding windows.

    SGLang hands the cap to each run but not to the plan, which is where FlashInfer chooses between a kernel that caps
    and one that does not; so its models with a cap run without it. And its prefill over new tokens alone forgets the
    window, which the one over the paged pool (`use_paged`) has.
    """

    def __init__(self, model_runner: Any, logit_cap: float) -> None:
        self._logit_cap = logit_cap
        super().__init__(model_runner)
        self.use_paged = self.use_paged or model_runner.sliding_window_size is not None
        for wrapper in (*self.decode_wrappers, *self.prefill_wrappers_paged, self.prefill_wrapper_ragged):
            self._plan_with_cap(wrapper)

    def _create_decode_wrappers(self, bs: int, num_tokens: int) -> list:
        wrappers = super()._create_decode_wrappers(bs, num_tokens)
        for wrapper in wrappers:
            self._plan_with_cap(wrapper)
        return wrappers

    def _plan_with_cap(self, wrapper: Any) -> None:
        if self._logit_cap:
            wrapper.begin_forward = partial(wrapper.begin_forward, logits_soft_cap=self._logit_cap)
