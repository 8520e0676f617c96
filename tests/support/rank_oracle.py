# SPDX-License-Identifier: Apache-2.0
"""A plugin of SGLang that compares the ranks of a server: batch and effort of each step, and all that they choose."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

LOG = "RANK_ORACLE_LOG"
"""Variable with the file that the first rank writes a line to for each comparison: what, and `same` or `differs`."""


def server_env(folder: Path) -> dict[str, str]:
    """Environment of a server that loads this file as a plugin. `folder` gets the plugin, and the log as `log`."""
    from plugin_folder import plugin_env  # here, since the server has this file alone

    return {**plugin_env(folder, __file__), LOG: str(folder / "log")}


def compared(folder: Path) -> set[str]:
    """The different lines of the log."""
    return set((folder / "log").read_text().splitlines())


def register() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    runner = "sglang_tokenselect.torch_runner.TorchRunner"
    HookRegistry.register(f"{runner}.begin", compare_step, HookType.BEFORE)
    HookRegistry.register(f"{runner}._selection", compare_selection, HookType.AFTER)
    HookRegistry.register(f"{runner}._block_positions", compare_block, HookType.AFTER)
    # Before anything is chosen: ranks of which one reuses and one votes would wait for each other for ever.
    serves = "sglang_tokenselect.kernels.reference.cache.CachedSelection.serves"
    HookRegistry.register(serves, compare_reuse, HookType.AFTER)


def compare_step(runner, plan, *args, **kwargs) -> None:
    compare("batch", plan)
    compare(f"level {runner.effort.level}", runner.effort)


def compare_selection(selection, *args, **kwargs) -> None:
    compare("selection", selection.ranked.tolist())


def compare_block(positions, *args, **kwargs) -> None:
    compare("block", positions.tolist())


def compare_reuse(serves: bool, *args, **kwargs) -> None:
    compare(f"reuse {serves}", serves)


def compare(what: str, value: Any) -> None:
    from sglang.srt.distributed.parallel_state import get_tp_group

    group = get_tp_group()
    values = group.all_gather_object(value)
    assert len(values) == group.world_size > 1
    if group.rank_in_group == 0:
        with open(os.environ[LOG], "a") as log:
            log.write(f"{what} {'same' if all(other == values[0] for other in values) else 'differs'}\n")
