# SPDX-License-Identifier: Apache-2.0
"""Tells the backend which requests a forward has: their rows of `req_to_token`, what they ask for and what they share.

Symptom without it: `ForwardBatch` has the rows on the device alone, so reading them would wait for the device in every
step; it has no custom_params and no radix tree; and CUDA graphs hand the backend a view without the requests.
Seam: `ForwardBatch.init_new`, where SGLang makes the forward's batch of the scheduler's, which has all on the host.
May go when `ForwardBatch` and its views carry them.
"""

from __future__ import annotations

from typing import Any

from .hook import Hook


def _stage(result: Any, cls: type, batch: Any, model_runner: Any, *args: Any, **kwargs: Any) -> None:
    stage = getattr(model_runner.attn_backend, "stage_requests", None)
    if stage is not None:
        is_decode = batch.forward_mode.is_decode()
        stage(batch.req_pool_indices_cpu.tolist(), batch.reqs, batch.tree_cache, is_decode=is_decode)


_SCHEDULED = "sglang.srt.managers.schedule_batch"
_BATCH, _REQ = f"{_SCHEDULED}.ScheduleBatch", f"{_SCHEDULED}.Req"
HOOKS = (
    Hook(
        "sglang.srt.model_executor.forward_batch_info.ForwardBatch.init_new",
        "after",
        _stage,
        ("cls", "batch", "model_runner"),
        (
            *(f"{_BATCH}.{name}" for name in ("req_pool_indices_cpu", "reqs", "tree_cache", "forward_mode")),
            *(f"{_REQ}.{name}" for name in ("origin_input_ids", "output_ids")),
        ),
    ),
)
