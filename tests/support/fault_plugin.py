# SPDX-License-Identifier: Apache-2.0
"""A plugin of SGLang that fails on purpose: in our runner, at a prompt of FATAL_TOKENS, or else when it registers."""

from __future__ import annotations

import os

FATAL_TOKENS = 613
REGISTER = "FAULT_AT_REGISTER"
"""Variable; where it is set, registering fails."""
MESSAGE = "a fault on purpose"


def register() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    if REGISTER in os.environ:
        raise RuntimeError(MESSAGE)
    HookRegistry.register("sglang_tokenselect.torch_runner.TorchRunner.run", _fail, HookType.BEFORE)


def _fail(runner, query, layer) -> None:
    plan = runner._plan
    if not plan.is_decode and any(request.seq_len == FATAL_TOKENS for request in plan.requests):
        raise RuntimeError(MESSAGE)
