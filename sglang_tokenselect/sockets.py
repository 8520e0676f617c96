# SPDX-License-Identifier: Apache-2.0
"""The ZMQ sockets of telemetry and control, owned by one thread, for they are not thread-safe; and their clients.

PUB at `config.publish`: each snapshot, one frame of JSON. REP at `config.control`: see control.py.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import socket
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import zmq

from sglang_tokenselect.config import ConfigError
from sglang_tokenselect.control import MAX_REQUEST_BYTES, Configurable, answer, refusal

if TYPE_CHECKING:
    from sglang_tokenselect.snapshot import Snapshot

logger = logging.getLogger(__name__)

MAX_QUEUED = 64
"""Snapshots on their way to the thread; the oldest is dropped."""
MAX_UNSENT = 2 * MAX_QUEUED
"""Messages to each peer; the newest is dropped. More than a full queue, which is sent at once."""

CLOSE_SECONDS = 5.0
IPC = "ipc://"


class TelemetryServer:
    """Binds what endpoints the configuration has, and serves them until `close`.

    Attributes:
        publish, control: the bound endpoints, with the port that was found for port 0; None where there is none.

    Raises:
        ConfigError: an endpoint cannot be bound.
    """

    def __init__(self, controller: Configurable) -> None:
        self._controller = controller
        self._latest: Snapshot | None = None
        self._queue: deque[Snapshot] = deque(maxlen=MAX_QUEUED)
        self._is_closed = False
        self._context = zmq.Context()
        config = controller.config
        try:
            self._publisher = self._bind("publish", zmq.PUB, config.publish)
            self._replier = self._bind("control", zmq.REP, config.control)
        except ConfigError:
            self._context.destroy(linger=0)
            raise
        self.publish, self.control = _bound_endpoint(self._publisher), _bound_endpoint(self._replier)
        self._wakeup, self._waker = socket.socketpair()
        self._wakeup.setblocking(False)
        self._waker.setblocking(False)
        self._thread = threading.Thread(target=self._serve, name="tokenselect-telemetry", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def send(self, snapshot: Snapshot) -> None:
        """Publishes a snapshot, or drops the oldest where too many wait. Returns at once; any thread may call."""
        self._latest = snapshot
        self._queue.append(snapshot)
        self._wake()

    def close(self) -> None:
        self._is_closed = True
        self._wake()
        self._thread.join(CLOSE_SECONDS)
        self._waker.close()

    def _wake(self) -> None:
        # Full: the thread is about to wake up. Closed: nobody is left to be woken.
        with suppress(OSError):
            self._waker.send(b"\0")

    def _bind(self, name: str, kind: int, endpoint: str | None) -> zmq.Socket | None:
        if endpoint is None:
            return None
        bound = _new_socket(self._context, kind, endpoint)
        try:
            if endpoint.startswith(IPC):
                _check_ipc_path(name, endpoint)
            bound.bind(endpoint)
            if endpoint.startswith(IPC):
                os.chmod(endpoint.removeprefix(IPC), 0o600)
        except (zmq.ZMQError, OSError) as error:
            raise ConfigError(name, "a free endpoint of this machine", str(error)) from None
        return bound

    def _serve(self) -> None:
        poller = zmq.Poller()
        poller.register(self._wakeup, zmq.POLLIN)
        if self._replier is not None:
            poller.register(self._replier, zmq.POLLIN)
        while not self._is_closed:
            poller.poll()
            # Before the queue is emptied: what is queued later finds the socket empty and wakes the thread again.
            with suppress(BlockingIOError):
                self._wakeup.recv(4096)
            self._publish_queued()
            self._answer_next()
        self._context.destroy(linger=0)
        self._wakeup.close()

    def _publish_queued(self) -> None:
        while self._queue:
            snapshot = self._queue.popleft()
            if self._publisher is None:
                continue
            try:
                self._publisher.send(json.dumps(snapshot.to_dict(), allow_nan=False).encode(), zmq.NOBLOCK)
            except Exception:
                logger.exception("tokenselect telemetry: a snapshot was lost")

    def _answer_next(self) -> None:
        if self._replier is None:
            return
        try:
            frames = self._replier.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            # Nothing, or what is no request to ZMQ; a wait for the next one would hold up the publishing.
            return
        self._replier.send(self._reply_to(frames), zmq.NOBLOCK)

    def _reply_to(self, frames: list[bytes]) -> bytes:
        try:
            if len(frames) != 1:
                raise ConfigError("request", "one frame", len(frames))
            return answer(frames[0], self._controller, self._latest)
        except ConfigError as error:
            return refusal(error)
        except Exception as error:
            logger.exception("tokenselect control: a request failed")
            return refusal(error)


@contextmanager
def open_client(kind: int, endpoint: str) -> Iterator[zmq.Socket]:
    """A SUB or REQ socket of such a server.

    Raises:
        ConfigError: nothing can listen on this endpoint.
    """
    with zmq.Context() as context, _new_socket(context, kind, endpoint) as client:
        if kind == zmq.SUB:
            client.subscribe(b"")
        try:
            client.connect(endpoint)
        except zmq.ZMQError as error:
            raise ConfigError("endpoint", "one that can be connected to", str(error)) from None
        yield client


def _new_socket(context: zmq.Context, kind: int, endpoint: str) -> zmq.Socket:
    created = context.socket(kind)
    created.linger = 0
    created.sndhwm = MAX_UNSENT
    created.maxmsgsize = MAX_REQUEST_BYTES
    created.ipv6 = "[" in endpoint
    return created


def _bound_endpoint(bound: zmq.Socket | None) -> str | None:
    return None if bound is None else bound.get_string(zmq.LAST_ENDPOINT)


def _check_ipc_path(name: str, endpoint: str) -> None:
    """Raises ConfigError unless the path is free or a socket left behind: ZMQ replaces whatever is there."""
    path = Path(endpoint.removeprefix(IPC))
    if not path.exists():
        return
    if not path.is_socket():
        raise ConfigError(name, "a path that is free or a socket", endpoint)
    with socket.socket(socket.AF_UNIX) as probe, suppress(ConnectionRefusedError):
        probe.connect(str(path))
        raise ConfigError(name, "a path that no other server listens on", endpoint)
