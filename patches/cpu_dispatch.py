# SPDX-License-Identifier: Apache-2.0
"""Where there is no accelerator, the engine's own small kernels run in PyTorch, and several ranks on any machine.

Symptoms without it: SGLang 0.5.17 decides by the backend's name whether to call Triton for filling `req_to_token` and
positions, so with an unknown name it calls Triton on a CPU and fails. With `--tp 2` it opens NCCL on the CPU, where the
library is installed, and fails. It and later ones bind each rank's threads to a NUMA node, and fail with more
ranks than nodes; only SGLang's own CPU kernels use that binding.
Seams: `support_triton(name)`, `init_model_parallel_group(use_pynccl=)` and `init_threads_binding`; installed only on
machines without an accelerator.
The first two may go with SGLang 0.5.17: later ones ask the platform.
"""

from __future__ import annotations

from typing import Any

import torch

from .hook import Hook

_GROUP = "sglang.srt.distributed.parallel_state.init_model_parallel_group"
_BINDING = "sglang.srt.utils.numa_utils.init_threads_binding"


def _no_triton(original, name: str) -> bool:
    return False


def _no_nccl(*args: Any, **kwargs: Any) -> tuple[tuple, dict]:
    """SGLang gives the flag by its name."""
    return args, {**kwargs, "use_pynccl": False}


def _bind_by_kernels_alone(original, *args: Any, **kwargs: Any) -> Any:
    has_kernels = hasattr(torch.ops.sgl_kernel, "init_cpu_threads_env")
    return original(*args, **kwargs) if has_kernels else None


HOOKS = (
    Hook("sglang.srt.utils.common.support_triton", "around", _no_triton, ("backend",)),
    Hook(_GROUP, "before", _no_nccl, ("group_ranks", "local_rank", "backend", "use_pynccl")),
    Hook(_BINDING, "around", _bind_by_kernels_alone, ()),
)
