# SPDX-License-Identifier: Apache-2.0
"""`sglang-tokenselect trace`: starts a server that records, asks one prompt, writes the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sglang_tokenselect.config import TokenSelectConfig
from sglang_tokenselect.needle import checkpoint_path
from sglang_tokenselect.recording.session import recording_session
from sglang_tokenselect.trace.options import TraceOptions
from sglang_tokenselect.trace.page import Trace, render
from sglang_tokenselect.trace.pieces import Mark, find_marks, token_texts
from sglang_tokenselect.trace.prompts import Prompt, from_file, needle_question
from sglang_tokenselect.trace.steps import Step


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
    if not options.out.parent.is_dir() or options.out.is_dir():
        raise SystemExit(f"--out: expected a file in a folder that exists, got {str(options.out)!r}")
    tokenizer = load_tokenizer(options.server.model_path or str(checkpoint_path()))
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
    if options.server.model_path is not None:
        raise SystemExit("--prompt: expected a file, since a model was given, got none")
    if options.mark is not None:
        raise SystemExit(f"--mark: expected --prompt with it, got --mark {options.mark!r} alone")
    return needle_question(checkpoint_path(), options.num_tokens)


def load_tokenizer(model_path: str) -> Any:
    # Only here, since it takes seconds.
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model_path)
    except (OSError, ValueError) as error:
        raise SystemExit(f"--model-path: expected a model with a tokenizer, got {model_path!r}: {error}") from None


def ask(options: TraceOptions, prompt: Prompt, input_ids: Sequence[int]) -> Reply:
    sampling = {"temperature": 0.0, "max_new_tokens": prompt.num_tokens}
    with recording_session(options.server) as session:
        recorded = session.ask({"input_ids": list(input_ids), "sampling_params": sampling})
    answer = recorded.answer
    steps = [Step.of_recording(recording) for recording in recorded.recordings]
    return Reply(input_ids, answer["output_ids"], answer["text"], session.config, steps)


def check_selects(reply: Reply) -> None:
    """Raises SystemExit if there is nothing to show."""
    if not reply.steps:
        raise SystemExit(f"answer: expected at least 2 tokens, the first comes from the prefill; got {reply.text!r}")
    # Not by the rows: those of a sliding window are never all tokens.
    if reply.steps[-1].seq_len <= reply.config.window.dense_len:
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
