# SPDX-License-Identifier: Apache-2.0
"""The server on the shipped needle checkpoint: one set of flags for the demo, `make serve` and the tests.

python -m sglang_tokenselect.needle_server [more flags of sglang.launch_server]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from sglang_tokenselect.needle import checkpoint_path
from sglang_tokenselect.server_process import ServerProcess

TRAINED_LENGTH = 4096
CONTEXT_LENGTH = 70_000

# --max-total-tokens sizes the KV pool (0.8 GB); the memory fraction only has to leave room for it beside
# the other server. --sleep-on-idle: an idle server leaves the cores to the other.
COMMON_FLAGS = (
    *("--device", "cpu", "--dtype", "float32", "--grammar-backend", "none"),
    *("--context-length", str(CONTEXT_LENGTH), "--max-total-tokens", "150000", "--mem-fraction-static", "0.5"),
    *("--sleep-on-idle", "--enable-cache-report"),
)
TOKENSELECT_FLAGS = (
    *("--tokenselect-positions", "compact"),
    *("--tokenselect-sink", "64", "--tokenselect-budget", "448", "--tokenselect-local", "128"),
    *("--tokenselect-block", "128", "--tokenselect-sub-block", "4", "--chunked-prefill-size", "4096"),
)
# In one chunk, since torch_native computes the whole prefix anew for each.
DENSE_FLAGS = ("--chunked-prefill-size", "-1")
SERVER_FLAGS = {"tokenselect": (*COMMON_FLAGS, *TOKENSELECT_FLAGS), "torch_native": (*COMMON_FLAGS, *DENSE_FLAGS)}

SERVER_ENV = {
    "CUDA_VISIBLE_DEVICES": "",  # on the CPU, on every machine
    "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",  # else the dense backend refuses the context length
    "HF_HUB_OFFLINE": "1",
}


def needle_server(backend: str = "tokenselect", *flags: str, model_path: Path | None = None) -> ServerProcess:
    """A server that is not started yet.

    Args:
        backend: `tokenselect` or `torch_native`, which is dense.
        flags: more flags of sglang.launch_server; they win over SERVER_FLAGS.
        model_path: another checkpoint of this architecture and tokenizer.
    """
    checkpoint = model_path or checkpoint_path()
    return ServerProcess(checkpoint, *SERVER_FLAGS[backend], *flags, backend=backend, env=SERVER_ENV)


def main() -> None:
    """Becomes the server. Flags that are given again on the command line win."""
    where = ("--model-path", str(checkpoint_path()), "--attention-backend", "tokenselect")
    command = (sys.executable, "-m", "sglang.launch_server", *where, *SERVER_FLAGS["tokenselect"], *sys.argv[1:])
    print(" ".join(command[1:]), flush=True)
    os.execve(sys.executable, command, {**os.environ, **SERVER_ENV})


if __name__ == "__main__":
    main()
