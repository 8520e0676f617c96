# SPDX-License-Identifier: Apache-2.0
"""The demo as a reader runs it, shortened, with real servers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

DEMO = (sys.executable, "-m", "sglang_tokenselect.cli", "demo")


@pytest.mark.smoke
def test_demo_answers_and_ends_by_itself(tmp_path):
    rows_path = tmp_path / "rows.json"
    options = ("--lengths", "4096,8192", "--questions", "2", "--json", str(rows_path))
    done = subprocess.run([*DEMO, *options], capture_output=True, text=True, timeout=600)
    print(done.stdout, done.stderr)
    assert done.returncode == 0
    rows = json.loads(rows_path.read_text())
    assert [row["length"] for row in rows] == [4096, 4096, 8192, 8192]
    assert all(row["tokenselect"]["is_right"] for row in rows)
    assert all(0 < row["tokenselect"]["attended_share"] < 0.2 for row in rows)
    for first, second in (rows[:2], rows[2:]):
        for backend in ("tokenselect", "dense"):
            assert second[backend]["cached_tokens"] > 0.9 * first[backend]["prompt_tokens"]
    assert "tokenselect answered 4 of 4 questions" in done.stdout.replace("\n", " ")


@pytest.mark.parametrize(("signum", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_demo_leaves_no_server_behind(signum, exit_code):
    demo = start_demo()
    servers = wait_for_children(demo.pid, 2)
    demo.send_signal(signum)
    output, _ = demo.communicate(timeout=60)
    assert demo.returncode == exit_code
    assert "End of the log of tokenselect" in output
    wait_until(lambda: not any(map(group_exists, servers)), "the servers' process groups to be gone")


def start_demo() -> subprocess.Popen[str]:
    # Where tests run in the background the shell lets them ignore SIGINT, and children inherit that.
    return subprocess.Popen(
        DEMO,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def wait_for_children(pid: int, count: int) -> list[int]:
    def children() -> list[int]:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    wait_until(lambda: len(children()) >= count, f"{count} children of the demo")
    return children()


def group_exists(pid: int) -> bool:
    """Whether any process of the group that `pid` leads is left."""
    try:
        os.killpg(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(condition: Callable[[], bool], what: str, timeout: float = 60.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"expected {what} within {timeout:.0f} s"
        time.sleep(0.2)
