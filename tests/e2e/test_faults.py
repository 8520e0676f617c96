# SPDX-License-Identifier: Apache-2.0
"""What fails ends the server with a reason and leaves nothing behind, or is told to who asked; nothing hangs.

docs/faults.md has the table.
"""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import time
import urllib.error
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import psutil
import pytest
from fault_plugin import FATAL_TOKENS, MESSAGE, REGISTER
from models import write_model
from plugin_folder import plugin_env
from traffic import SPARSE, TOKEN_SERVER, Request, ask

from sglang_tokenselect.server_process import ServerProcess

SUPPORT = __file__.rsplit("/e2e/", 1)[0] + "/support"
# Without it a server whose scheduler lives waits 65 s for core dumps of a GPU before it ends; it has none here.
NO_DUMPS = {"SGLANG_CUDA_COREDUMP_BEFORE_CRASH": "0", "SGLANG_PYSPY_DUMP_BEFORE_CRASH": "0"}
SECONDS_TO_END = 20.0
# To start in vain, on a machine that is busy.
SECONDS_TO_REFUSE = 180.0
SHORT = Request(list(range(3, 50)), 4)
LONG = Request(list(range(3, 500)), 3000)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("llama"), "Llama")


@pytest.fixture
def start(llama):
    """Starts servers, and ends them after the test."""
    servers = []

    def start(*flags, env=None):
        server = ServerProcess(llama, *TOKEN_SERVER, *SPARSE, *flags, env={**NO_DUMPS, **(env or {})})
        servers.append(server)
        server.start()
        return server

    yield start
    for server in servers:
        server.stop()


def ready(server):
    server.wait_until_ready()
    return server


def named(server, name):
    [found] = [p for p in session_of(server) if p.cmdline()[:1] == [f"sglang::{name}"]]
    return found


def end_of(server, seconds=SECONDS_TO_END):
    """Exit status of a server that ends in time; none of its processes may outlive it by more than some seconds."""
    status = server.wait(seconds)
    assert psutil.wait_procs(session_of(server), timeout=5.0)[1] == []
    return status


def session_of(server):
    """The server's processes, those whose parents are gone among them."""
    found = []
    for process in psutil.process_iter():
        with suppress(ProcessLookupError):
            if os.getsid(process.pid) == server.pid:
                found.append(process)
    return found


def ask_in_thread(pool, server, request=LONG):
    running = pool.submit(ask, server, request)
    time.sleep(1.5)
    assert not running.done()
    return running


def assert_error(running):
    """The client's connection ends, in time."""
    with pytest.raises((urllib.error.URLError, ConnectionError, http.client.HTTPException)):
        running.result(timeout=5.0)


@pytest.mark.parametrize(
    ("name", "is_busy"),
    [("scheduler", False), ("scheduler", True), ("detokenizer", True)],
    ids=["scheduler-idle", "scheduler-busy", "detokenizer-busy"],
)
def test_a_killed_process_ends_the_server(start, name, is_busy):
    server = ready(start())
    with ThreadPoolExecutor(1) as pool:
        running = ask_in_thread(pool, server) if is_busy else None
        named(server, name).kill()
        assert end_of(server) != 0
        if running is not None:
            assert_error(running)
    assert re.search(rf"Subprocess {name}\S* .*crashed with exit code -9", server.log_tail())


def test_an_error_in_the_backend_ends_the_server(start, tmp_path):
    server = ready(start(env=plugin_env(tmp_path, f"{SUPPORT}/fault_plugin.py")))
    with ThreadPoolExecutor(1) as pool:
        running = ask_in_thread(pool, server)
        with pytest.raises((urllib.error.URLError, ConnectionError, http.client.HTTPException)):
            ask(server, Request([7] * FATAL_TOKENS, 1))
        assert end_of(server) != 0
        assert_error(running)
    assert f"RuntimeError: {MESSAGE}" in server.log_tail()


def test_sigterm_lets_requests_finish(start):
    server = ready(start())
    with ThreadPoolExecutor(1) as pool:
        running = ask_in_thread(pool, server, LONG)
        psutil.Process(server.pid).send_signal(signal.SIGTERM)
        assert len(running.result(timeout=60.0)) == LONG.max_new_tokens
        assert end_of(server) in (0, -signal.SIGKILL)  # SGLang kills itself in the end
    assert "Traceback" not in server.log_tail()


def test_a_full_disk_ends_a_server_that_records(start, tmp_path):
    """Every file that a recorder would write next is one on a full device."""
    server = ready(start("--tokenselect-record", str(tmp_path), "--max-running-requests", "4"))
    written = len(list(tmp_path.glob("*.npz")))
    for number in range(written, written + 20):
        for row in range(8):
            (tmp_path / f"{number:08d}-{row}.partial").symlink_to("/dev/full")
    with pytest.raises((urllib.error.URLError, ConnectionError, http.client.HTTPException)):
        ask(server, Request(SHORT.input_ids, 20))
    assert end_of(server) != 0
    assert "No space left on device" in server.log_tail()


def test_a_folder_that_cannot_be_written_is_refused(start, tmp_path):
    (tmp_path / "file").write_text("")
    server = start("--tokenselect-record", str(tmp_path / "file" / "folder"))
    assert end_of(server, SECONDS_TO_REFUSE) == 1
    assert "tokenselect: record: expected a folder to write to" in server.log_tail(1)


def test_an_endpoint_in_use_is_refused(start):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        server = start("--tokenselect-control", f"tcp://127.0.0.1:{taken.getsockname()[1]}")
        assert end_of(server, SECONDS_TO_REFUSE) != 0
    assert "tokenselect control: expected a free endpoint of this machine" in server.log_tail()


@pytest.fixture(scope="module")
def small(llama, tmp_path_factory):
    """A pool smaller than the context, and another plugin that fails to register."""
    env = plugin_env(tmp_path_factory.mktemp("plugin"), f"{SUPPORT}/fault_plugin.py")
    flags = ("--max-total-tokens", "400", "--chunked-prefill-size", "64", "--context-length", "2000")
    with ServerProcess(llama, *TOKEN_SERVER, *SPARSE, *flags, env={**env, REGISTER: "1"}) as server:
        yield server


@pytest.mark.parametrize("num_tokens", [399, 401, 1990, 2000, 5000])
def test_what_does_not_fit_is_refused_and_serving_goes_on(small, num_tokens):
    """Beyond the pool, and beyond the context."""
    with pytest.raises(urllib.error.HTTPError) as refused:
        ask(small, Request([7] * num_tokens, 64))
    assert refused.value.code == 400
    assert re.search(r"long|context|exceed", refused.value.read().decode())
    assert len(ask(small, SHORT)) == 4


def test_an_answer_that_outgrows_the_pool_ends(small):
    """Not refused, since it may end before: SGLang aborts it, or ends it with the pool."""
    try:
        assert len(ask(small, Request([7] * 300, 1500))) < 1500
    except urllib.error.HTTPError as error:
        assert error.code in (400, 500)
    assert len(ask(small, SHORT)) == 4


def test_another_plugin_that_fails_changes_nothing(small):
    assert MESSAGE in small.log_path.read_text()
    assert len(ask(small, SHORT)) == 4


def test_a_port_in_use_ends_the_second_server(small, start):
    """SGLang asks whoever has the port for an answer before it ends; here that is a server, which gives one."""
    second = start("--port", small.url.rsplit(":", 1)[1])
    assert end_of(second, SECONDS_TO_REFUSE) != 0
    assert "address already in use" in second.log_tail()
    assert len(ask(small, SHORT)) == 4
