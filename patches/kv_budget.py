# SPDX-License-Identifier: Apache-2.0
"""The KV pool leaves room for the selection's memory.

Symptom without it: SGLang sizes the KV pool before it builds the attention backend, so the selection cache and the
scratch would come out of what it leaves for activations, and a large one could end in an out-of-memory error.
Seam: `KVCacheConfigurator._profile_available_bytes`, the bytes that the pool is made from.
May go when a backend can say what it needs before the pool is sized.
"""

from __future__ import annotations

from typing import Any

from sglang_tokenselect import flags
from sglang_tokenselect.plugin import BACKEND
from sglang_tokenselect.refusals import Refusal

from .hook import Hook


def _leave_room(result: int, configurator: Any, *args: Any, **kwargs: Any) -> int | None:
    server_args = configurator.server_args
    if server_args.attention_backend != BACKEND or configurator.device != "cuda":
        return None
    from sglang_tokenselect.memory_plan import MemoryPlan

    config = flags.attached(server_args)
    if not config.selects_by.has_kernels:
        return None
    plan = MemoryPlan(config, configurator.model_config, configurator.kv_cache_dtype, server_args)
    needed = plan.num_bytes
    if needed >= result:
        reason = (
            f"a --mem-fraction-static above {server_args.mem_fraction_static} gives the KV pool more; {plan.advice()}"
        )
        raise Refusal("GPU memory", f"more than the {needed:,} bytes of the selection", f"{result:,}", reason)
    return result - needed


_CONFIGURATOR = "sglang.srt.mem_cache.kv_cache_configurator.KVCacheConfigurator"
HOOKS = (
    Hook(
        f"{_CONFIGURATOR}._profile_available_bytes",
        "after",
        _leave_room,
        ("self",),
        tuple(f"{_CONFIGURATOR}.{name}" for name in ("server_args", "device", "model_config", "kv_cache_dtype")),
    ),
)
