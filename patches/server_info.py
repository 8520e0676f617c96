# SPDX-License-Identifier: Apache-2.0
"""`/server_info` tells the configuration and what was attended to so far, under "tokenselect".

Seam: `Scheduler.get_internal_state` returns a dict of plain builtins, which the route passes on.
"""

from __future__ import annotations

from typing import Any

from .hook import Hook


def _add_report(result: Any, scheduler: Any, *args: Any, **kwargs: Any) -> None:
    report = getattr(scheduler.tp_worker.model_runner.attn_backend, "report", None)
    if report is not None:
        result.internal_state["tokenselect"] = report()


_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"
HOOKS = (
    Hook(
        f"{_SCHEDULER}.get_internal_state",
        "after",
        _add_report,
        ("self",),
        (f"{_SCHEDULER}.tp_worker", "sglang.srt.managers.io_struct.GetInternalStateReqOutput.internal_state"),
    ),
)
