# SPDX-License-Identifier: Apache-2.0
"""Registers all hooks, once SGLang is what they were written for, and proves later that SGLang applied them.

SGLang logs a plugin that raises, or a hook that fails to apply, and serves on: so the backend calls `verify` at start.
"""

from __future__ import annotations

import torch

from sglang_tokenselect import compat

from . import (
    chunk_alignment,
    cpu_dispatch,
    decode_graphs,
    effort,
    forward_requests,
    kv_budget,
    request_options,
    server_args,
    server_info,
)
from .hook import Hook


def hooks() -> list[Hook]:
    """The hooks that this machine needs, in the order in which they are registered."""
    needed = [*server_args.HOOKS, *chunk_alignment.HOOKS, *request_options.HOOKS, *server_info.HOOKS]
    needed += [*forward_requests.HOOKS, *effort.HOOKS]
    if torch.cuda.is_available():
        # With other versions a server on the GPU is refused, by a message that a hook's would keep from being seen.
        if compat.untested_on_gpus() is None:
            needed += [*decode_graphs.HOOKS, *kv_budget.HOOKS]
    elif not torch.accelerator.is_available():
        needed += cpu_dispatch.HOOKS
    return needed


def check() -> None:
    """Raises RuntimeError if SGLang differs from what any hook of this process relies on."""
    if faults := [fault for hook in hooks() for fault in hook.find_faults()]:
        raise RuntimeError(
            f"sglang-tokenselect: hooks: SGLang {compat.found_sglang()} (expected {compat.expected_sglang()}) is not "
            "what they were written for:" + "".join(f"\n  {fault}" for fault in faults)
        )


def install() -> None:
    """Registers the hooks. What could fail, `check` has told before."""
    for hook in hooks():
        hook.register()


def verify() -> None:
    """Raises RuntimeError if any hook is not in place in this process, or relies on what is not there."""
    check()
    missing = [hook.target for hook in hooks() if not hook.is_applied()]
    if missing:
        raise RuntimeError(
            f"sglang-tokenselect: hooks: expected all applied in SGLang {compat.found_sglang()}, got none on "
            f"{', '.join(missing)}; SGLang's log of its plugins, above, has the cause"
        )
