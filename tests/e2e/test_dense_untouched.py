# SPDX-License-Identifier: Apache-2.0
"""Installed, but not asked for: a dense server with the plugin does what it does without.

Without it means that SGLang skips it (SGLANG_PLUGINS); what is left of this package then is the CPU platform, which a
machine without an accelerator needs to run SGLang at all, and which steps aside on a GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
from accelerator import HAS_CUDA
from models import write_model
from traffic import GPU_TOKEN_SERVER, TOKEN_SERVER, mixed_requests

from sglang_tokenselect.server_process import ServerProcess

pytestmark = pytest.mark.smoke

BACKEND, FLAGS = ("flashinfer", GPU_TOKEN_SERVER) if HAS_CUDA else ("torch_native", TOKEN_SERVER)
WITHOUT = {"SGLANG_PLUGINS": "tokenselect_cpu"}
REQUESTS = mixed_requests(24, longest=600, seed=8)
# Of an answer; the rest is times and identifiers.
TOLD = ("prompt_tokens", "completion_tokens", "cached_tokens", "finish_reason")
TOLD_LOGPROBS = ("input_token_logprobs", "output_token_logprobs", "output_top_logprobs")
# Of /server_info: what two starts of one command do not have in common.
PER_START = {"port", "launch_command", "startup_time", "internal_states"}


def has_flags(env: dict[str, str]) -> bool:
    """Whether SGLang loads the plugin."""
    command = [sys.executable, "-m", "sglang.launch_server", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **env}, cwd="/tmp")
    return "--tokenselect-budget" in done.stdout


def answer(server: ServerProcess, input_ids: list[int], logprobs_from: int = -1, **sampling: Any) -> dict[str, Any]:
    """Tokens, their logprobs to the last bit (JSON keeps it), and what was cached.

    Args:
        logprobs_from: 0: of the prompt too, which then is computed anew; -1: of the answer, behind what is cached.
    """
    payload = {"input_ids": input_ids, "return_logprob": True, "logprob_start_len": logprobs_from}
    payload["top_logprobs_num"] = 3
    payload["sampling_params"] = {"temperature": 0.0, "max_new_tokens": 12, "ignore_eos": True, **sampling}
    reply = server.post("/generate", payload)
    return {"output_ids": reply["output_ids"], **{name: reply["meta_info"][name] for name in (*TOLD, *TOLD_LOGPROBS)}}


def observe(model, env: dict[str, str]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Answers, one after the other so that batches are the same; and the server's arguments."""
    flags = (*FLAGS, "--chunked-prefill-size", "96", "--context-length", "2048")
    with ServerProcess(model, *flags, backend=BACKEND, env=env) as server:
        answers = [answer(server, request.input_ids, -(i % 2)) for i, request in enumerate(REQUESTS)]
        answers.append(answer(server, [5, 6, 7], custom_params={"tokenselect": "somebody else's"}))
        return answers, {name: told for name, told in server.get("/server_info").items() if name not in PER_START}


def test_a_dense_server_is_the_same_with_the_plugin(tmp_path):
    assert has_flags({}) and not has_flags(WITHOUT)
    model = write_model(tmp_path, "Llama")
    answers, info = observe(model, {})
    expected_answers, expected_info = observe(model, WITHOUT)
    assert answers == expected_answers
    assert any(answer["cached_tokens"] for answer in answers)
    assert info == expected_info
    assert not [name for name in info if "tokenselect" in name]
