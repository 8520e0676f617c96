# SPDX-License-Identifier: Apache-2.0
"""`sglang-tokenselect trace`: starts a server that records, asks one prompt, writes the page."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_tokenselect.config import TokenSelectConfig
from sglang_tokenselect.demo import allow_loopback
from sglang_tokenselect.needle import checkpoint_path
from sglang_tokenselect.needle_server import needle_server
from sglang_tokenselect.recording.session import generate_recorded, record_flags
from sglang_tokenselect.server_process import ServerProcess
from sglang_tokenselect.trace.page import Trace, render
from sglang_tokenselect.trace.pieces import Mark, find_marks, token_texts
from sglang_tokenselect.trace.prompts import Prompt, from_file, needle_question
from sglang_tokenselect.trace.steps import Step


@dataclass(frozen=True)
class TraceOptions:
    """What to trace. Without a model the shipped checkpoint, without a prompt a needle question for it.

    Attributes:
        mark: a text of the prompt file to mark.
        num_tokens: of the answer, at most; None: as the prompt has it.
        server_flags: more flags of sglang.launch_server; they win over those that this command gives.
    """

    out: Path
    model_path: str | None = None
    prompt: Path | None = None
    mark: str | None = None
    num_tokens: int | None = None
    server_flags: Sequence[str] = ()


@dataclass(frozen=True)
class Reply:
    """What the server did.

    Attributes:
        input_ids: of the prompt.
        output_ids: of the answer.
        text: the answer.
        config: what the server runs with.
        steps: one per output token after the first.
    """

    input_ids: Sequence[int]
    output_ids: Sequence[int]
    text: str
    config: TokenSelectConfig
    steps: Sequence[Step]


def run_trace(options: TraceOptions) -> int:
    """Returns the exit code."""
    prompt = choose_prompt(options)
    if not options.out.parent.is_dir():
        raise SystemExit(f"--out: expected a file in a folder that exists, got {str(options.out)!r}")
    # Only here, since it takes seconds.
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(options.model_path or checkpoint_path())
    reply = ask(options, prompt, tokenizer(prompt.text)["input_ids"])
    check_selects(reply)
    page = render(make_trace(prompt, reply, tokenizer))
    options.out.write_text(page, encoding="utf-8")
    print(f"answer: {reply.text.strip()}")
    print(f"{options.out}: {len(reply.steps)} steps about {len(reply.input_ids):,} tokens, {len(page) / 1e6:.1f} MB")
    return 0


def choose_prompt(options: TraceOptions) -> Prompt:
    if options.prompt is not None:
        return from_file(options.prompt, options.mark, options.num_tokens)
    if options.model_path is not None:
        raise SystemExit("--prompt: expected a file, since a model was given, got none")
    if options.mark is not None:
        raise SystemExit(f"--mark: expected --prompt with it, got --mark {options.mark!r} alone")
    return needle_question(checkpoint_path(), options.num_tokens)


def ask(options: TraceOptions, prompt: Prompt, input_ids: Sequence[int]) -> Reply:
    sampling = {"temperature": 0.0, "max_new_tokens": prompt.num_tokens}
    payload = {"input_ids": list(input_ids), "sampling_params": sampling}
    allow_loopback()
    print("SGLang starts", flush=True)
    try:
        with (
            tempfile.TemporaryDirectory(prefix="tokenselect-trace-") as folder,
            recording_server(options, Path(folder)) as server,
        ):
            config = TokenSelectConfig.from_options(server.report()["config"])
            recorded = generate_recorded(server, Path(folder), payload)
    except (RuntimeError, OSError) as error:
        raise SystemExit(f"server: expected an answer, got {error}") from None
    answer = recorded.answer
    steps = [Step.of_recording(recording) for recording in recorded.recordings]
    return Reply(input_ids, answer["output_ids"], answer["text"], config, steps)


def recording_server(options: TraceOptions, folder: Path) -> ServerProcess:
    flags = (*record_flags(folder), *options.server_flags)
    if options.model_path is None:
        return needle_server(False, *flags)
    return ServerProcess(options.model_path, *flags)


def check_selects(reply: Reply) -> None:
    """Raises SystemExit if there is nothing to show."""
    if not reply.steps:
        raise SystemExit(f"answer: expected at least 2 tokens, the first comes from the prefill; got {reply.text!r}")
    if not any(row for step in reply.steps for row in step.rows):
        raise SystemExit(
            f"prompt: expected at least {reply.config.window.dense_len} tokens, got {len(reply.input_ids)}: with fewer "
            "a query attends to everything (--tokenselect-min-len, or sink + budget + local)"
        )


def make_trace(prompt: Prompt, reply: Reply, tokenizer: Any) -> Trace:
    texts = token_texts([*reply.input_ids, *reply.output_ids], tokenizer.decode)
    num_prompt_tokens = len(reply.input_ids)
    return Trace(
        title=prompt.title,
        texts=texts,
        num_prompt_tokens=num_prompt_tokens,
        sink=reply.config.sink,
        local=reply.config.local,
        marks=all_marks(texts[:num_prompt_tokens], prompt.marked),
        steps=reply.steps,
    )


def all_marks(texts: Sequence[str], marked: Sequence[str]) -> list[Mark]:
    marks = [mark for wanted in marked for mark in find_marks(texts, wanted)]
    return sorted(marks, key=lambda mark: mark.start)
