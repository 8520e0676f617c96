# SPDX-License-Identifier: Apache-2.0
"""Registers all hooks, and proves later that SGLang applied them.

SGLang logs a hook that fails to apply and serves on, so the backend calls `verify` at start.
"""

from __future__ import annotations

import torch

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
        needed += [*decode_graphs.HOOKS, *kv_budget.HOOKS]
    elif not torch.accelerator.is_available():
        needed += cpu_dispatch.HOOKS
    return needed


def install() -> None:
    for hook in hooks():
        hook.register()


def verify() -> None:
    """Raises RuntimeError if any hook is not in place in this process."""
    missing = [hook.target for hook in hooks() if not hook.is_applied()]
    if missing:
        raise RuntimeError(
            "sglang-tokenselect: hooks: expected all applied, got none on "
            f"{', '.join(missing)}; SGLang's log of its plugins, above, has the cause"
        )
