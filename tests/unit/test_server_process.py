# SPDX-License-Identifier: Apache-2.0
"""A server that is started is ended, whenever the program is."""

from __future__ import annotations

import signal
import subprocess

import pytest

from sglang_tokenselect.server_process import ServerProcess


class Ended(Exception):
    """What the program's own handler raises."""


@pytest.fixture
def own_handler():
    def end(signum, frame):
        raise Ended

    before = signal.signal(signal.SIGTERM, end)
    yield end
    signal.signal(signal.SIGTERM, before)


def test_a_signal_between_fork_and_return_leaves_no_server_behind(own_handler, monkeypatch):
    started = []

    class Slow(subprocess.Popen):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            started.append(self)
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(subprocess, "Popen", Slow)
    sleeper = ServerProcess("model", launcher=("-c", "import time; time.sleep(60)"))
    with pytest.raises(Ended), sleeper:
        pass
    [process] = started
    assert process.poll() == -signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is own_handler
    sleeper.log_path.unlink()
