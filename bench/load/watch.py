# SPDX-License-Identifier: Apache-2.0
"""`sglang-tokenselect monitor` in a terminal of tmux, while clients come to a real server on the CPU one by one.

    python bench/load/watch.py

Six clients, 6 s apart, each with a text of its own and questions about it; policy slo with a target of 40 ms. Prints
what the terminal shows after 39 s.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # as a script, this file sees its own folder only

from sglang_tokenselect.needle import tasks
from sglang_tokenselect.needle_server import needle_server
from sglang_tokenselect.server_process import ServerProcess, free_port

CLIENTS, APART, WATCHED = 6, 6.0, 39.0  # seconds
WORDS, ANSWER_TOKENS = 6000, 150
FLAGS = ("--tokenselect-policy", "slo", "--tokenselect-itl-target-ms", "40", "--tokenselect-mass-every", "4")
SESSION = "tokenselect-watch"


def ask_until(server: ServerProcess, number: int, end: float) -> None:
    context = tasks.make_context(tasks.held_out(number), WORDS, count_tokens=lambda text: len(text.split()))
    [prompt, *_] = [sample.prompt for sample in tasks.questions(context)]
    time.sleep(APART * number)
    sampling = {"max_new_tokens": ANSWER_TOKENS, "temperature": 0, "ignore_eos": True}
    while time.monotonic() < end:
        server.post("/generate", {"text": prompt, "sampling_params": sampling})


def tmux(*arguments: str) -> str:
    return subprocess.run(["tmux", *arguments], check=True, capture_output=True, text=True).stdout


def main() -> None:
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    with needle_server(False, *FLAGS, "--tokenselect-publish", endpoint) as server:
        monitor = f"{sys.executable} -m sglang_tokenselect.cli monitor {endpoint}"
        tmux("new-session", "-d", "-s", SESSION, "-x", "112", "-y", "18", monitor)
        end = time.monotonic() + WATCHED
        clients = [threading.Thread(target=ask_until, args=(server, number, end)) for number in range(CLIENTS)]
        for client in clients:
            client.start()
        time.sleep(WATCHED)
        print(tmux("capture-pane", "-p", "-t", SESSION))
        tmux("kill-session", "-t", SESSION)
        for client in clients:
            client.join()


if __name__ == "__main__":
    main()
