# SPDX-License-Identifier: Apache-2.0
"""The server on the shipped needle checkpoint: one set of flags for the demo, `make serve` and the tests.

python -m sglang_tokenselect.needle_server [--device cuda] [more flags of sglang.launch_server]
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from sglang_tokenselect.needle import checkpoint_path
from sglang_tokenselect.server_process import ServerProcess

CONTEXT_LENGTH = 70_000

# The backend that is dense, and the flags of the device.
DEVICES = {
    "cpu": ("torch_native", ("--device", "cpu", "--dtype", "float32")),
    "cuda": ("flashinfer", ("--device", "cuda", "--dtype", "bfloat16", "--cuda-graph-backend-prefill", "disabled")),
}
# --max-total-tokens sizes the KV pool (0.8 GB); the memory fraction only has to leave room for it beside
# the other server. --sleep-on-idle: an idle server leaves the cores to the other.
COMMON_FLAGS = (
    *("--grammar-backend", "none"),
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

SERVER_ENV = {
    "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",  # else the dense backend refuses the context length
    "HF_HUB_OFFLINE": "1",
}


def needle_server(
    is_dense: bool = False, *flags: str, device: str = "cpu", model_path: Path | None = None
) -> ServerProcess:
    """A server that is not started yet.

    Args:
        is_dense: with dense attention instead of TokenSelect.
        flags: more flags of sglang.launch_server; they win over those here.
        device: "cpu" or "cuda".
        model_path: another checkpoint of this architecture and tokenizer.
    """
    backend = DEVICES[device][0] if is_dense else "tokenselect"
    checkpoint = model_path or checkpoint_path()
    return ServerProcess(
        checkpoint, *server_flags(is_dense, device), *flags, backend=backend, env=server_environment(device)
    )


def server_flags(is_dense: bool, device: str) -> tuple[str, ...]:
    return (*DEVICES[device][1], *COMMON_FLAGS, *(DENSE_FLAGS if is_dense else TOKENSELECT_FLAGS))


def server_environment(device: str) -> dict[str, str]:
    return {**SERVER_ENV, "CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else SERVER_ENV


def main() -> None:
    """Becomes the server. Flags that are given again on the command line win."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--device", choices=DEVICES, default="cpu")
    device = parser.parse_known_args()[0].device
    where = ("--model-path", str(checkpoint_path()), "--attention-backend", "tokenselect")
    flags = (*where, *server_flags(is_dense=False, device=device), *sys.argv[1:])
    command = (sys.executable, "-m", "sglang.launch_server", *flags)
    print(" ".join(command[1:]), flush=True)
    os.execve(sys.executable, command, {**os.environ, **server_environment(device)})


if __name__ == "__main__":
    main()
