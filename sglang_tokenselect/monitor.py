# SPDX-License-Identifier: Apache-2.0
"""`sglang-tokenselect monitor`: follows the snapshots that a server publishes."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator

import msgspec
import zmq
from rich.console import Console
from rich.live import Live

from sglang_tokenselect.config import ConfigError
from sglang_tokenselect.monitor_view import MonitorView, one_line
from sglang_tokenselect.snapshot import Snapshot
from sglang_tokenselect.sockets import open_client

REFRESH_SECONDS = 0.5
LARGEST_NUMBER = 1e15
"""Beyond, a message is malformed: no server counts so far."""


def run_monitor(endpoint: str, *, once: bool, as_json: bool, timeout: float) -> int:
    """Shows snapshots until interrupted; a view that renews itself in a terminal, lines elsewhere.

    Args:
        once: shows the first one and returns.
        timeout: seconds to wait for that one.

    Returns:
        The exit code.
    """
    console = Console()
    try:
        with open_client(zmq.SUB, endpoint) as subscriber:
            if once:
                return _show_first(subscriber, console, endpoint, as_json=as_json, timeout=timeout)
            if as_json or not console.is_terminal or console.is_dumb_terminal:
                return _print_lines(subscriber, as_json=as_json)
            return _show_live(subscriber, console, endpoint)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1


def receive(subscriber: zmq.Socket, seconds: float) -> Snapshot | None:
    """The next snapshot; None if no message came in this time, or one that is no snapshot."""
    if not subscriber.poll(round(1000 * seconds)):
        return None
    frames = subscriber.recv_multipart()
    return parse_snapshot(frames[0]) if len(frames) == 1 else None


def parse_snapshot(message: bytes) -> Snapshot | None:
    """None for what no server publishes: anything else than a snapshot, endless numbers, a policy unfit to be shown."""
    try:
        snapshot = msgspec.json.decode(message, type=Snapshot)
    except (msgspec.DecodeError, RecursionError):
        return None
    numbers = [value for value in vars(snapshot).values() if isinstance(value, (int, float))]
    numbers += snapshot.counters.values()
    if not all(math.isfinite(number) and abs(number) < LARGEST_NUMBER for number in numbers):
        return None
    return snapshot if snapshot.policy.isascii() and snapshot.policy.isidentifier() else None


def _show_first(subscriber: zmq.Socket, console: Console, endpoint: str, *, as_json: bool, timeout: float) -> int:
    deadline = time.monotonic() + timeout
    while (seconds := deadline - time.monotonic()) > 0:
        snapshot = receive(subscriber, seconds)
        if snapshot is None:
            continue
        if as_json:
            print(json.dumps(snapshot.to_dict()))
        else:
            view = MonitorView(endpoint)
            view.add(snapshot)
            console.print(view)
        return 0
    print(f"monitor: expected a message from {endpoint} within {timeout:g} s, got none", file=sys.stderr)
    return 1


def _print_lines(subscriber: zmq.Socket, *, as_json: bool) -> int:
    try:
        for snapshot in _snapshots(subscriber):
            if snapshot is not None:
                print(json.dumps(snapshot.to_dict()) if as_json else one_line(snapshot), flush=True)
    except BrokenPipeError:
        # The reader has left, as `head` does. What Python flushes at its end must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _show_live(subscriber: zmq.Socket, console: Console, endpoint: str) -> int:
    view = MonitorView(endpoint)
    with Live(view, console=console, auto_refresh=False) as live:
        for snapshot in _snapshots(subscriber):
            if snapshot is not None:
                view.add(snapshot)
            live.refresh()
    return 0


def _snapshots(subscriber: zmq.Socket) -> Iterator[Snapshot | None]:
    """Without end; None after each REFRESH_SECONDS without a snapshot."""
    while True:
        yield receive(subscriber, REFRESH_SECONDS)
