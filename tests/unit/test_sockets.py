# SPDX-License-Identifier: Apache-2.0
"""The sockets of telemetry and control, with real clients: good ones, rude ones and absent ones."""

from __future__ import annotations

import json
import socket
import stat
import threading
import time
from contextlib import closing, contextmanager
from dataclasses import replace

import pytest
import zmq
from snapshots import SNAPSHOT

from sglang_tokenselect.config import ConfigError, TokenSelectConfig
from sglang_tokenselect.control import MAX_REQUEST_BYTES
from sglang_tokenselect.controller import Controller
from sglang_tokenselect.sockets import MAX_QUEUED, TelemetryServer, open_client

TCP = "tcp://127.0.0.1:0"
GET = b'{"command": "get"}'
SECONDS = 5.0


def serve(**endpoints: str):
    return closing(TelemetryServer(Controller(TokenSelectConfig(**endpoints))))


@pytest.fixture(params=["tcp", "tcp6", "ipc"])
def endpoint(request, tmp_path):
    return {"tcp": TCP, "tcp6": "tcp://[::1]:0", "ipc": f"ipc://{tmp_path}/socket"}[request.param]


@pytest.fixture
def server():
    with serve(publish=TCP, control=TCP) as server:
        yield server


@contextmanager
def subscribed(server: TelemetryServer):
    """A subscriber that the server knows: it has seen the snapshot of time 0."""
    with open_client(zmq.SUB, server.publish) as subscriber:
        end = time.monotonic() + SECONDS
        while not subscriber.poll(10):
            assert time.monotonic() < end, "no snapshot came"
            server.send(replace(SNAPSHOT, time=0.0))
        yield subscriber


def received_times(subscriber: zmq.Socket) -> list[float]:
    """Of the snapshots that come, but for those of time 0, until one has a negative time."""
    times = []
    while True:
        assert subscriber.poll(1000 * SECONDS), f"only {times} came"
        if (when := json.loads(subscriber.recv())["time"]) < 0:
            return times
        if when > 0:
            times.append(when)


def ask(endpoint: str, request: bytes = GET) -> dict:
    with open_client(zmq.REQ, endpoint) as client:
        client.send(request)
        assert client.poll(1000 * SECONDS), "no answer came"
        return json.loads(client.recv())


def test_a_snapshot_is_one_frame_of_json(endpoint):
    with serve(publish=endpoint) as server, subscribed(server) as subscriber:
        frames = subscriber.recv_multipart()
        assert [json.loads(frame) for frame in frames] == [replace(SNAPSHOT, time=0.0).to_dict()]


def test_commands_are_answered_with_the_latest_snapshot(endpoint):
    with serve(control=endpoint) as server:
        assert ask(server.control)["snapshot"] is None
        server.send(SNAPSHOT)
        assert ask(server.control)["snapshot"] == SNAPSHOT.to_dict()
        assert ask(server.control, b'{"command": "set", "options": {"level": 3}}')["config"]["level"] == 3
        assert ask(server.control)["config"]["level"] == 3


def send_and_leave(endpoint: str, kind: int, *frames: bytes, times: int = 1) -> None:
    with zmq.Context() as context, context.socket(kind) as client:
        client.connect(endpoint)
        for _ in range(times):
            client.send_multipart(frames)
        # Lets the frames out, and takes no answer to them.
        client.poll(50)
        client.linger = 0


def send_bytes(endpoint: str, content: bytes) -> None:
    host, port = endpoint.removeprefix("tcp://").split(":")
    with socket.create_connection((host, int(port))) as client:
        client.sendall(content)


RUDE = {
    "garbage": lambda endpoint: send_and_leave(endpoint, zmq.REQ, b"\x00\xff garbage"),
    "no wait for the answer": lambda endpoint: send_and_leave(endpoint, zmq.REQ, GET),
    "many requests": lambda endpoint: send_and_leave(endpoint, zmq.DEALER, b"", GET, times=500),
    "many frames": lambda endpoint: send_and_leave(endpoint, zmq.DEALER, b"", *[GET] * 500),
    "too large": lambda endpoint: send_and_leave(endpoint, zmq.REQ, b"x" * (MAX_REQUEST_BYTES + 1)),
    "no envelope": lambda endpoint: send_and_leave(endpoint, zmq.DEALER, b"x", b"y"),
    "another kind of socket": lambda endpoint: send_and_leave(endpoint, zmq.PUSH, GET),
    "another protocol": lambda endpoint: send_bytes(endpoint, b"GET / HTTP/1.1\r\n\r\n"),
    "a bad frame": lambda endpoint: send_bytes(endpoint, b"\xff" + bytes(8) + b"\x7f" + b"\xff" * 200),
}


@pytest.mark.parametrize("name", RUDE)
def test_after_a_rude_client_the_next_one_is_served(server, name):
    for _ in range(2):
        RUDE[name](server.control)
    assert ask(server.control)["ok"] is True
    with subscribed(server):
        pass


@pytest.mark.parametrize("frames", [(GET, GET), (b"", GET), (GET, *[b"x"] * 50)])
def test_a_request_of_several_frames_is_refused(server, frames):
    with open_client(zmq.REQ, server.control) as client:
        client.send_multipart(frames)
        assert client.poll(1000 * SECONDS)
        assert json.loads(client.recv()) == {
            "ok": False,
            "error": f"tokenselect request: expected one frame, got {len(frames)}",
        }


def test_a_request_that_is_too_large_is_not_even_read(server):
    with open_client(zmq.REQ, server.control) as client:
        client.send(GET.ljust(MAX_REQUEST_BYTES + 1))
        assert not client.poll(200)
    assert ask(server.control, GET.ljust(MAX_REQUEST_BYTES))["ok"] is True


def test_a_failing_controller_is_answered_and_outlived(server, caplog):
    def fail(changes):
        raise RuntimeError("boom")

    server._controller.configure = fail
    assert ask(server.control, b'{"command": "set", "options": {"level": 1}}') == {"ok": False, "error": "boom"}
    assert "boom" in caplog.text
    assert ask(server.control)["ok"] is True


def test_a_snapshot_that_is_not_json_is_lost_alone(server, caplog):
    with subscribed(server) as subscriber:
        for when in (float("nan"), 1.0, -1.0):
            server.send(replace(SNAPSHOT, time=when))
        assert received_times(subscriber) == [1.0]
    assert "a snapshot was lost" in caplog.text


@pytest.mark.parametrize("endpoints", [{"publish": TCP}, {"control": TCP}])
def test_sends_never_wait(endpoints):
    with serve(**endpoints) as server:
        begin = time.perf_counter()
        for _ in range(10_000):
            server.send(SNAPSHOT)
        assert time.perf_counter() - begin < 2.0


def test_the_oldest_snapshots_are_dropped_while_the_thread_is_held_up(server):
    is_held, may_go = threading.Event(), threading.Event()

    def hold(changes):
        is_held.set()
        assert may_go.wait(SECONDS)
        raise ConfigError("level", "any", None)

    server._controller.configure = hold
    with subscribed(server) as subscriber:
        asking = threading.Thread(target=ask, args=(server.control, b'{"command": "set", "options": {"level": 1}}'))
        asking.start()
        assert is_held.wait(SECONDS)
        begin = time.perf_counter()
        for when in range(1, 3 * MAX_QUEUED):
            server.send(replace(SNAPSHOT, time=when))
        server.send(replace(SNAPSHOT, time=-1.0))
        assert time.perf_counter() - begin < 1.0
        may_go.set()
        assert received_times(subscriber) == list(range(2 * MAX_QUEUED + 1, 3 * MAX_QUEUED))
        asking.join()


def test_close_ends_the_thread_and_frees_the_endpoints(server):
    server.close()
    assert not server._thread.is_alive()
    server.send(SNAPSHOT)
    server.close()
    with serve(publish=server.publish, control=server.control) as second:
        assert ask(second.control)["ok"] is True


@pytest.mark.parametrize("name", ["publish", "control"])
def test_an_endpoint_in_use_is_told(server, name):
    taken = getattr(server, name)
    with pytest.raises(ConfigError, match=rf"{name}: expected a free endpoint of this machine, got .*in use.*{taken}"):
        TelemetryServer(Controller(TokenSelectConfig(**{name: taken})))


def test_if_one_endpoint_is_in_use_the_other_is_free_again(server, tmp_path):
    free = f"ipc://{tmp_path}/free"
    with pytest.raises(ConfigError) as failed:
        TelemetryServer(Controller(TokenSelectConfig(publish=free, control=server.control)))
    with serve(publish=free):
        # Not because Python has collected the first: the traceback keeps it.
        assert failed.traceback


def test_an_ipc_socket_is_the_users_own_and_may_have_been_left_behind(tmp_path):
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(path))
    with serve(control=f"ipc://{path}") as server:
        assert stat.filemode(path.stat().st_mode) == "srw-------"
        assert ask(server.control)["ok"] is True


def test_an_ipc_path_takes_no_place_of_another_servers_or_files(tmp_path):
    file = tmp_path / "file"
    file.write_text("kept")
    with serve(publish=f"ipc://{tmp_path}/socket") as server:
        for endpoint, expected in (
            (server.publish, "a path that no other server listens on"),
            (f"ipc://{file}", "a path that is free or a socket"),
            ("ipc://relative", "tcp://HOST:PORT or ipc:///PATH"),
            ("ipc://@abstract", "tcp://HOST:PORT or ipc:///PATH"),
        ):
            with pytest.raises(ConfigError, match=f"control: expected {expected}, got '{endpoint}'"):
                TelemetryServer(Controller(TokenSelectConfig(control=endpoint)))
        with subscribed(server):
            pass
    assert file.read_text() == "kept"
