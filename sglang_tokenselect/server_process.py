# SPDX-License-Identifier: Apache-2.0
"""A real SGLang server as a child process: started, awaited, and ended with all its processes.

Used by the demo, the evaluation and the tests.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_ENDS = (signal.SIGINT, signal.SIGTERM)


class ServerProcess:
    """`python -m sglang.launch_server` on the loopback, as a context manager.

    Attributes:
        url: http://127.0.0.1:PORT
        log_path: the file with the server's output.
    """

    def __init__(
        self,
        model_path: str | Path,
        *flags: str,
        backend: str = "tokenselect",
        env: dict[str, str] | None = None,
        launcher: Sequence[str] = ("-m", "sglang.launch_server"),
    ) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log_path = Path(tempfile.mkstemp(prefix="sglang-server-", suffix=".log")[1])
        where = ["--model-path", str(model_path), "--host", "127.0.0.1", "--port", str(port)]
        self.command = [sys.executable, *launcher, *where, "--attention-backend", backend, *flags]
        # Nothing here comes from a hub; without this, loading a local folder may still ask one.
        self._env = {**os.environ, "HF_HUB_OFFLINE": "1", **(env or {})}
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> ServerProcess:
        try:
            self.start()
            self.wait_until_ready()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *exc_info: object) -> None:
        """Ends the server. Its log stays only where something went wrong."""
        self.stop()
        if exc_type is None:
            self.log_path.unlink()

    def start(self) -> None:
        with _signals_deferred(), self.log_path.open("wb") as log:
            self._process = subprocess.Popen(
                self.command, stdout=log, stderr=subprocess.STDOUT, env=self._env, start_new_session=True
            )

    def wait_until_ready(self, timeout: float = 300.0, on_wait: Callable[[float], None] | None = None) -> None:
        """Waits for the first answer of the server.

        Args:
            on_wait: called about once a second with the seconds waited so far.

        Raises:
            RuntimeError: the server ended, or was not ready in `timeout` seconds; with the end of its log.
        """
        begin = time.monotonic()
        while not self._is_ready():
            waited = time.monotonic() - begin
            if self._started().poll() is not None or waited > timeout:
                raise RuntimeError(
                    f"server not ready after {waited:.0f} s: {' '.join(self.command)}\n{self.log_tail()}"
                )
            if on_wait is not None:
                on_wait(waited)
            time.sleep(1.0)

    @property
    def pid(self) -> int:
        """Of the process that was started; SGLang's other processes are its children."""
        return self._started().pid

    def wait(self, timeout: float) -> int:
        """The exit status of a server that ends by itself; subprocess.TimeoutExpired if it does not."""
        return self._started().wait(timeout)

    def stop(self) -> None:
        if self._process is None:
            return
        for signum, patience in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
            try:
                os.killpg(self._process.pid, signum)
                self._process.wait(patience)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue
        self._process = None

    def log_tail(self, num_lines: int = 30) -> str:
        return "\n".join(self.log_path.read_text(errors="replace").splitlines()[-num_lines:])

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=60) as response:
            return json.load(response)

    def post(self, path: str, payload: dict[str, Any], timeout: float = 3600.0) -> Any:
        """The JSON answer; an HTTP error status raises urllib.error.HTTPError."""
        return json.loads(self.post_text(path, payload, timeout))

    def post_text(self, path: str, payload: dict[str, Any], timeout: float = 3600.0) -> str:
        """The answer as it is: some routes of SGLang answer with nothing, or with a sentence."""
        body = json.dumps(payload).encode()
        request = urllib.request.Request(self.url + path, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=timeout) as response:
            return response.read().decode()

    def flush(self) -> None:
        """Empties the radix cache, once the last step of the requests before is over."""
        self.post_text("/flush_cache?timeout=60", {})

    def report(self) -> dict[str, Any]:
        """TokenSelect's part of `/server_info`."""
        return self.get("/server_info")["internal_states"][0]["tokenselect"]

    def counters(self) -> dict[str, int]:
        """TokenSelect's counters so far (see counters.Counters)."""
        return self.report()["counters"]

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is None:
            raise RuntimeError("server: expected one that was started, got none")
        return self._process

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(self.url + "/health_generate", timeout=30):
                return True
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False


@contextmanager
def _signals_deferred() -> Iterator[None]:
    """What ends this program from outside waits: else it could come between a new process and our knowledge of it."""
    if threading.current_thread() is not threading.main_thread():  # which alone is interrupted
        yield
        return
    came: list[int] = []
    handlers = {signum: signal.signal(signum, lambda number, frame: came.append(number)) for signum in _ENDS}
    try:
        yield
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        for number in came:
            signal.raise_signal(number)


def allow_loopback() -> None:
    """Requests to the servers go to this machine, whatever proxy the environment names."""
    for name in ("no_proxy", "NO_PROXY"):
        os.environ[name] = ",".join(filter(None, (os.environ.get(name), "127.0.0.1")))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
