# SPDX-License-Identifier: Apache-2.0
"""The engine's own small kernels run in PyTorch where there is no accelerator.

Symptom without it: SGLang 0.5.17 decides by the backend's name whether to call Triton for filling
`req_to_token` and positions, so with an unknown name it calls Triton on a CPU and fails.
Seam: `support_triton(name)`; installed only on machines without an accelerator.
May go with SGLang 0.5.17: later ones ask the platform.
"""

from __future__ import annotations

from .hook import Hook


def _no_triton(original, name: str) -> bool:
    return False


HOOKS = (Hook("sglang.srt.utils.common.support_triton", "around", _no_triton),)
