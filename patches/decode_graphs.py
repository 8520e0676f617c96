# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of each kind of decode step, for each batch size: runner.Step.

Symptom without it: steps of short requests would run the selection's kernels for nothing, and steps of requests that
share nothing those for shared prefixes; a step with more tokens than the selection's scratch holds would be replayed
in a graph that is too small for it; and the scheduler would believe that a replay reads `req_to_token` no more, while
the selection reads it in every layer.
Seams: SGLang 0.5.17 captures two graphs of a batch size where its class says `record_nolora_graph` (meant for LoRA,
refused here), each by `capture_one_shape` after `_set_capture_lora_variant`, and asks `_resolve_lora_variant` which
one serves a batch; `can_run_graph`; `execute`, after which the scheduler waits for `war_fastpath_read_done_event`, or
for the whole forward if there is none.
May go when 0.5.17 is no longer served: later versions ask the backend for variants and for the end of its reads.
"""

from __future__ import annotations

from typing import Any

from sglang_tokenselect.runner import Step

from .hook import Hook

_RUNNER = "sglang.srt.model_executor.runner.decode_cuda_graph_runner.DecodeCudaGraphRunner"
_LABELS = {Step.SELECTS: "lora", Step.EVERYTHING: "nolora", Step.SHARES: "tokenselect_shares"}
_STEPS = {label: step for step, label in _LABELS.items()}


def capture_all() -> None:
    """Has graph runners of this process capture the graphs of all kinds."""
    from sglang.srt.model_executor.runner.decode_cuda_graph_runner import DecodeCudaGraphRunner

    DecodeCudaGraphRunner.record_nolora_graph = True


def captured_step() -> Step | None:
    """What the graph that is being captured is to do; None where only one is captured."""
    from sglang.srt.model_executor.runner_utils.capture_mode import get_capture_lora_variant

    return _STEPS.get(get_capture_lora_variant())


def _capture(result: Any, runner: Any, size: int, forward: Any, stream_idx: Any = None, label: Any = None) -> None:
    """Behind the graph that selects, the one that shares: SGLang knows of two only."""
    if label == _LABELS[Step.SELECTS] and _is_ours(runner) and runner.attn_backend.may_share(size):
        from sglang.srt.model_executor.runner_utils import capture_mode

        capture_mode._set_capture_lora_variant(_LABELS[Step.SHARES])
        runner.capture_one_shape(size, forward, stream_idx, _LABELS[Step.SHARES])


def _variant(original: Any, runner: Any, forward_batch: Any) -> str | None:
    if not _is_ours(runner):
        return original(runner, forward_batch)
    return _LABELS[runner.attn_backend.decode_step(forward_batch.seq_lens_cpu.tolist())]


def _can_run(result: bool, runner: Any, forward_batch: Any) -> bool | None:
    if result and _is_ours(runner) and not forward_batch.forward_mode.is_idle():
        return runner.attn_backend.fits_graph(forward_batch.seq_lens_cpu.tolist())
    return None


def _read_until_the_end(result: Any, runner: Any, *args: Any, **kwargs: Any) -> None:
    if _is_ours(runner) and runner.attn_backend.selects:
        runner.model_runner.war_fastpath_read_done_event = None


def _is_ours(runner: Any) -> bool:
    return hasattr(runner.attn_backend, "decode_step")


_CAPTURE_MODE = "sglang.srt.model_executor.runner_utils.capture_mode"
_CAPTURE_USES = (
    f"{_CAPTURE_MODE}._set_capture_lora_variant",
    f"{_CAPTURE_MODE}.get_capture_lora_variant",
    f"{_RUNNER}.record_nolora_graph",
)
_FORWARD = ("self", "forward_batch")
HOOKS = (
    Hook(
        f"{_RUNNER}.capture_one_shape",
        "after",
        _capture,
        ("self", "size", "forward", "stream_idx", "variant_label"),
        _CAPTURE_USES,
    ),
    Hook(f"{_RUNNER}._resolve_lora_variant", "around", _variant, _FORWARD),
    Hook(f"{_RUNNER}.can_run_graph", "after", _can_run, _FORWARD),
    Hook(
        f"{_RUNNER}.execute",
        "after",
        _read_until_the_end,
        _FORWARD,
        (f"{_RUNNER}.war_fastpath_read_done_event",),
    ),
)
