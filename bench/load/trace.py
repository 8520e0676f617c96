# SPDX-License-Identifier: Apache-2.0
"""The effort that a server publishes while it runs: received in a thread, averaged over decode steps."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean

import zmq

from sglang_tokenselect.monitor import receive
from sglang_tokenselect.snapshot import Snapshot
from sglang_tokenselect.sockets import open_client

POLL_SECONDS = 0.1
COLUMNS = ("level", "budget", "itl_ms", "running", "waiting")


class Trace:
    """What comes from `endpoint` while the context lasts. The server may start later."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._snapshots: list[Snapshot] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._receive)

    def __enter__(self) -> Trace:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._ended.set()
        self._thread.join()

    def between(self, begin: float, end: float) -> list[Snapshot]:
        """Those published between two Unix times, and first the one that held at `begin`."""
        snapshots = list(self._snapshots)
        held = [snapshot for snapshot in snapshots if snapshot.time <= begin][-1:]
        return held + [snapshot for snapshot in snapshots if begin < snapshot.time < end]

    def _receive(self) -> None:
        with open_client(zmq.SUB, self._endpoint) as subscriber:
            while not self._ended.is_set():
                if (snapshot := receive(subscriber, POLL_SECONDS)) is not None:
                    self._snapshots.append(snapshot)


def mean_effort(snapshots: Sequence[Snapshot], begun: int, ended: int) -> dict[str, float]:
    """Mean level and budget of the decode queries: each has those of the snapshot before it. {} without any.

    Args:
        begun, ended: decode queries that the server had counted before and after the cell.
    """
    counts = [*(max(snapshot.counters["decode_queries"], begun) for snapshot in snapshots), ended]
    weights = [after - before for before, after in pairwise(counts)]
    if not sum(weights):
        return {}
    return {
        f"mean_{name}": round(fmean([getattr(snapshot, name) for snapshot in snapshots], weights), 3)
        for name in ("level", "budget")
    }


def row(snapshot: Snapshot, begin: float) -> dict[str, object]:
    """Of the trace's file; its time in seconds since `begin`."""
    return {"time": f"{snapshot.time - begin:.3f}", **{name: getattr(snapshot, name) for name in COLUMNS}}
