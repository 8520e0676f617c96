# SPDX-License-Identifier: Apache-2.0
"""Whether SGLang runs on our CPU platform. Kept apart from the class, which imports SGLang: SGLang may
call this entry point while it is being imported itself."""

from __future__ import annotations

import os
from importlib.metadata import entry_points

import torch

NAME = "tokenselect_cpu"
PLATFORM = "sglang_tokenselect.torch_cpu.TorchCpuPlatform"


def activate() -> str | None:
    """Entry point of `sglang.srt.platforms`: the class to use, or None to step aside.

    It steps aside where an accelerator is seen, where SGLang's own CPU engine is asked for, and
    where another platform plugin is installed, unless `SGLANG_PLATFORM` names this one.
    """
    if torch.accelerator.is_available() or os.environ.get("SGLANG_USE_CPU_ENGINE") == "1":
        return None
    others = [entry.name for entry in entry_points(group="sglang.srt.platforms") if entry.name != NAME]
    if others and os.environ.get("SGLANG_PLATFORM") != NAME:
        return None
    return PLATFORM
