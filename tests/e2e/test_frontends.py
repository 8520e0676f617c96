# SPDX-License-Identifier: Apache-2.0
"""Every way to start SGLang leads to the same backend, or to a clear end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from models import write_model
from traffic import TOKEN_SERVER, Request, ask

from sglang_tokenselect.server_process import ServerProcess

SUPPORT = Path(__file__).parents[1] / "support"
COMMANDS = Path(sys.executable).parent


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("llama"), "Llama")


def run(*command, env=None, timeout=300):
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, env={**os.environ, **(env or {})}, cwd="/tmp"
    )


def test_engine_takes_one_keyword(llama):
    done = run(sys.executable, str(SUPPORT / "engine_program.py"), str(llama))
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["options"].items() <= told["report"]["config"].items()
    assert len(told["output_ids"]) == 4
    assert told["report"]["counters"]["block_votes"] > 0


def test_sglang_serve(llama):
    """With flags; other users' custom_params pass."""
    launcher = (str(COMMANDS / "sglang"), "serve")
    with ServerProcess(llama, *TOKEN_SERVER, "--tokenselect-budget", "77", launcher=launcher) as server:
        assert server.report()["config"]["budget"] == 77
        other = {"max_new_tokens": 2, "custom_params": {"anything": 1}}
        assert server.post("/generate", {"input_ids": [5, 6, 7], "sampling_params": other})["output_ids"]
        assert len(ask(server, Request([5, 6, 7], 3))) == 3


def launch(model, *flags, env=None):
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), "--port", "1"]
    return run(*command, *TOKEN_SERVER, "--attention-backend", "tokenselect", *flags, env=env)


def test_help_shows_the_flags():
    done = run(sys.executable, "-m", "sglang.launch_server", "--help")
    assert done.returncode == 0
    assert "--tokenselect-max-reuse" in done.stdout


def test_without_the_plugin_sglang_does_not_know_the_name(llama):
    done = launch(llama, env={"SGLANG_PLUGINS": "some_other_plugin"})
    assert done.returncode == 2
    assert "invalid choice: 'tokenselect'" in done.stderr


def test_another_sglang_is_refused_with_both_versions_named(llama, tmp_path):
    """A distribution that says it is a later SGLang stands before the installed one on the path."""
    info = tmp_path / "sglang-0.5.24.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 0.5.24\n")
    done = launch(llama, env={"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2
    assert "sglang: expected >=0.5.17,<0.5.24, got 0.5.24" in done.stderr + done.stdout
    assert "invalid choice: 'tokenselect'" in done.stderr


def test_a_refusal_ends_the_launch_with_one_line(llama):
    done = launch(llama, "--page-size", "16")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == (
        "error: tokenselect: page_size: expected None or 1, got 16 (tokens are selected one by one)"
    )


def test_a_model_that_is_not_served_ends_the_server(tmp_path):
    """Seen only once the model is there: the server must end, not serve it densely."""
    model = write_model(tmp_path, "Gemma", hidden_act="gelu_pytorch_tanh")
    server = ServerProcess(model, *TOKEN_SERVER)
    server.start()
    with pytest.raises(RuntimeError, match="expected one of LlamaForCausalLM, .*got GemmaForCausalLM"):
        try:
            server.wait_until_ready()
        finally:
            server.stop()
