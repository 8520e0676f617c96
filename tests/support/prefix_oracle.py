# SPDX-License-Identifier: Apache-2.0
"""What requests share, told by their slots alone; and a plugin of SGLang that checks a server's forwards by it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch

from sglang_tokenselect.kernels.shared_segment import SharedSegment
from sglang_tokenselect.prefix_groups import GRANULE, MIN_TOKENS

LOG = "PREFIX_ORACLE_LOG"
"""Variable with the file that gets a line for each forward whose requests share something."""


def expected_segments(rows: Sequence[torch.Tensor], min_requests: int) -> set[SharedSegment]:
    """Granule by granule, of which the first has MIN_TOKENS.

    Args:
        rows: slots of each request.
    """
    segments, start = set(), 0
    for end in range(MIN_TOKENS, max(map(len, rows), default=0) + 1, GRANULE):
        sharing: dict[tuple[int, ...], list[int]] = {}
        for index, row in enumerate(rows):
            if len(row) >= end:
                sharing.setdefault(tuple(row[:end].tolist()), []).append(index)
        for members in map(tuple, sharing.values()):
            if len(members) >= min_requests:
                before = [segment for segment in segments if segment.rows == members and segment.end == start]
                segments -= set(before)
                segments.add(SharedSegment(members, before[0].start if before else start, end))
        start = end
    return segments


def assert_nested(segments: Sequence[SharedSegment]) -> None:
    """What SharedSegment promises."""
    last: dict[int, SharedSegment] = {}
    for segment in segments:
        assert len(segment.rows) >= 2 and list(segment.rows) == sorted(set(segment.rows))
        assert segment.start < segment.end
        [before] = {last.get(row) for row in segment.rows}
        if before is None:
            assert segment.start == 0 and segment.end >= MIN_TOKENS
        else:
            assert segment.start == before.end and set(segment.rows) < set(before.rows)
        last.update(dict.fromkeys(segment.rows, segment))


def server_env(folder: Path) -> dict[str, str]:
    """Environment of a server that loads this file as a plugin. `folder` gets the plugin, and the log as `log`."""
    from plugin_folder import plugin_env  # here, since the server has this file alone

    return {**plugin_env(folder, __file__), LOG: str(folder / "log")}


def register() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register("sglang_tokenselect.torch_runner.TorchRunner.run", check_forward, HookType.BEFORE)


def check_forward(runner, query: torch.Tensor, layer) -> None:
    """In each layer: the plan's segments are those of equal slots. A failure ends the server."""
    plan = runner._plan
    rows = [runner._req_to_token[request.req_pool_idx, : request.seq_len] for request in plan.requests]
    assert_nested(plan.shared)
    expected = expected_segments(rows, runner.config.min_group)
    assert set(plan.shared) == expected, (plan.shared, expected)
    if plan.shared and layer.layer_id == 0:
        kind, depth = "decode" if plan.is_decode else "extend", "deep" if plan.shared[-1].start else "flat"
        with open(os.environ[LOG], "a") as log:
            log.write(f"{kind} {depth}\n")
