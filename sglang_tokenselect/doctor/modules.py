# SPDX-License-Identifier: Apache-2.0
"""The kernels of FlashInfer that a server will load: shipped, compiled before, or still to be compiled.

A module that is neither shipped nor in FlashInfer's cache is compiled at its first use, with ninja and nvcc: half a
minute to some minutes.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_tokenselect import compat
from sglang_tokenselect.doctor.planned import PlannedServer
from sglang_tokenselect.doctor.report import Section

if TYPE_CHECKING:
    from sglang.srt.configs.model_config import ModelConfig

SHIPPED, COMPILED, TO_COMPILE = "shipped", "compiled before", "to be compiled at first use"


def examine(planned: PlannedServer) -> Section:
    if not planned.has_kernels:
        return Section({"FlashInfer": "not used: PyTorch attends"})
    if untested := compat.untested_on_gpus():
        return Section({"FlashInfer": f"not told: {untested[0]} is {untested[2]}, expected {untested[1]}"})
    section = Section({SHIPPED: [], COMPILED: [], TO_COMPILE: []})
    for name in dict.fromkeys(_names(planned, planned.model_config())):
        section.facts[_state(name)].append(name)
    return section


def _names(planned: PlannedServer, model_config: ModelConfig) -> Iterator[str]:
    """As FlashInfer names them, those of layers that select first."""
    import torch
    from flashinfer.jit.attention.modules import get_batch_decode_uri, get_batch_prefill_uri
    from sglang.srt.layers.attention.flashinfer_backend import should_use_tensor_core

    shape, is_compact = planned.shape(model_config), planned.config.is_compact
    has_cap = bool(getattr(model_config.hf_text_config, "attn_logit_softcapping", None))
    dtypes = (shape.dtype, shape.kv_dtype, shape.dtype, torch.int32, shape.head_dim, shape.head_dim)

    def prefill(backend: str, has_window: bool = False) -> str:
        return get_batch_prefill_uri(backend, *dtypes, int(is_compact), has_window, has_cap, False)

    yield prefill("fa2")
    if is_compact:
        return
    # What FlashInfer's "auto" is on GPUs of compute capability 9.0; its kernels for them read keys of 16 bits.
    if shape.kv_dtype == shape.dtype:
        yield prefill("fa3")
    # The rest is SGLang's backend, for requests and layers that attend to everything.
    if not should_use_tensor_core(shape.kv_dtype, shape.num_qo_heads, shape.num_kv_heads):
        yield get_batch_decode_uri(*dtypes, 0, False, has_cap)
    if getattr(model_config, "sliding_window_size", None):
        yield prefill("fa2", has_window=True)


def _state(name: str) -> str:
    from flashinfer.jit import env

    if _library(env.FLASHINFER_AOT_DIR, name).exists():
        return SHIPPED
    return COMPILED if _library(env.FLASHINFER_JIT_DIR, name).exists() else TO_COMPILE


def _library(folder: Any, name: str) -> Path:
    return Path(folder) / name / f"{name}.so"
