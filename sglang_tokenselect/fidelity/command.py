# SPDX-License-Identifier: Apache-2.0
"""`sglang-tokenselect fidelity`: asks a server that records, along dense trajectories, and sums up what it measured."""

from __future__ import annotations

import numpy as np

from sglang_tokenselect.config import TokenSelectConfig
from sglang_tokenselect.fidelity.figure import write_figure
from sglang_tokenselect.fidelity.options import FidelityOptions
from sglang_tokenselect.fidelity.prompts import read_prompts
from sglang_tokenselect.fidelity.summary import Summary
from sglang_tokenselect.recording.recording import Recording
from sglang_tokenselect.recording.session import recording_session
from sglang_tokenselect.request_options import KEY

# Dense attention is only worth comparing with where the model knows its positions: within its trained length.
NEEDLE_FLAGS = ("--tokenselect-positions", "absolute", "--tokenselect-min-len", "0")


def run_fidelity(options: FidelityOptions) -> int:
    """Returns the exit code."""
    if options.server.model_path is not None and not options.prompts:
        raise SystemExit("--prompts: expected text files with --model-path, got none")
    prompts = read_prompts(options.prompts)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"--out: expected a folder, got {error}") from None
    summary = _measure(options, prompts)
    table, figure = options.out / "fidelity.csv", options.out / "fidelity.png"
    summary.write_csv(table)
    write_figure(summary, options.max_error, figure)
    print(f"\nbudget {summary.config.budget}, means of {summary.num_queries} decode queries:\n{summary.table()}\n")
    print(f"{summary.advice(options.max_error)}\n\nwritten: {table}, {figure}")
    return 0


def _measure(options: FidelityOptions, prompts: dict[str, str]) -> Summary:
    recordings: list[Recording] = []
    with recording_session(options.server, NEEDLE_FLAGS) as session:
        for name, prompt in prompts.items():
            recorded = session.ask(_payload(prompt, options.num_steps))
            check_prompt(name, recorded.recordings, session.config)
            recordings += recorded.recordings
            print(f"{name}: {recorded.answer['meta_info']['prompt_tokens']:,} tokens", flush=True)
    return Summary.of(recordings, session.config)


def _payload(prompt: str, num_steps: int) -> dict:
    """Dense, so that each step is measured where the model itself would have come to. Prefill writes one token."""
    sampling = {"temperature": 0.0, "max_new_tokens": num_steps + 1, "ignore_eos": True}
    return {"text": prompt, "sampling_params": {**sampling, "custom_params": {KEY: {"dense": True}}}}


def check_prompt(name: str, recordings: tuple[Recording, ...], config: TokenSelectConfig) -> None:
    """
    Raises:
        SystemExit: a prompt that is too short to choose anything, or too long to be compared with dense attention.
    """
    shortest, longest = recordings[0].seq_len, recordings[-1].seq_len
    if shortest <= config.window.size:
        # Of the prompt; the first query reads one token more.
        expected = f"expected at least {config.window.size} tokens (sink + budget + local)"
        raise SystemExit(f"{name}: {expected}, so that a query chooses, got {shortest - 1}")
    if np.isnan(recordings[-1].error).all():
        expected = "expected at most the model's trained length, with compact positions"
        raise SystemExit(f"{name}: {expected}, as dense attention is lost beyond it, got {longest} tokens")
