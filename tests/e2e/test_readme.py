# SPDX-License-Identifier: Apache-2.0
"""The README's snippets, run as they stand (on a free port)."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sglang_tokenselect.needle import tasks
from sglang_tokenselect.server_process import ServerProcess, free_port

pytestmark = pytest.mark.smoke
REPO = Path(__file__).parents[2]
README = (REPO / "README.md").read_text()
ENV = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"}


def snippets(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


class ReadmeServer(ServerProcess):
    """The README's launch command as a server: started by the shell, awaited and ended as the others."""

    def __init__(self, command: str) -> None:
        super().__init__("unused")
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.command = ["bash", "-c", "exec " + command.replace("30000", str(port))]
        self._env = ENV


@pytest.fixture(scope="module")
def server():
    [command] = [snippet for snippet in snippets("bash") if "launch_server" in snippet]
    with ReadmeServer(command) as server:
        yield server


def run_python(snippet: str, tmp_path: Path) -> str:
    """From a file, since the Engine's processes import their main module again."""
    program = tmp_path / "snippet.py"
    program.write_text(snippet)
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, timeout=600, env=ENV)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_frontend_program(server, tmp_path):
    [snippet] = [snippet for snippet in snippets("python") if "@sgl.function" in snippet]
    printed = run_python(snippet.replace("http://127.0.0.1:30000", server.url), tmp_path).splitlines()
    assert len(printed) == 3
    right = [tasks.score(line.split(")", 1)[1], re.findall(r"\d{6}", line.split(")")[0])) for line in printed]
    assert sum(right) >= 2, printed
    counters = server.counters()
    assert 0 < counters["attended_tokens"] < 0.2 * counters["cached_tokens"]


def test_options_of_a_request(server, tmp_path):
    [snippet] = [snippet for snippet in snippets("python") if "custom_params" in snippet]
    assert run_python(snippet.replace("http://127.0.0.1:30000", server.url), tmp_path).strip()


def test_engine(tmp_path):
    [snippet] = [snippet for snippet in snippets("python") if "sgl.Engine" in snippet]
    assert run_python(snippet, tmp_path).strip()
