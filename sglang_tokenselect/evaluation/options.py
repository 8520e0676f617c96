# SPDX-License-Identifier: Apache-2.0
"""The options of `sglang-tokenselect eval`."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sglang_tokenselect.evaluation.tasks.registry import SUITES, TASKS

MAX_DEPTHS = 11
DEFAULT_NAMES = {1: ("server",), 2: ("first", "second")}


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = f"Tasks: {', '.join(TASKS)}."
    _add_server_options(parser)
    _add_question_options(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of answers and reports")


def _add_server_options(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--url", help="OpenAI-compatible server to ask, such as http://127.0.0.1:30000")
    what.add_argument("--compare", nargs=2, metavar=("URL1", "URL2"), help="two servers to ask the same")
    what.add_argument("--show", action="store_true", help="asks nothing: prints DIR's table and writes its reports")
    parser.add_argument(
        "--names",
        nargs="+",
        metavar="NAME",
        help="of the server in tables; of both with --compare (default: server; first second)",
    )
    parser.add_argument("--model", metavar="NAME", help="to ask for (default: the first that the server lists)")
    parser.add_argument(
        "--api",
        choices=("completions", "chat"),
        default="completions",
        help="chat: each prompt with its answer's beginning is one user message (default: %(default)s)",
    )
    parser.add_argument("--tokenizer", metavar="FOLDER_OR_NAME", help="of the model (default: what the server names)")
    parser.add_argument(
        "--api-key",
        default=os.environ.get("OPENAI_API_KEY"),
        metavar="KEY",
        help="of the servers (default: the environment's OPENAI_API_KEY)",
    )
    parser.add_argument(
        "--extra-body",
        type=parse_object,
        default={},
        metavar="JSON",
        help='sent with every request, such as \'{"custom_params": {"tokenselect": {"budget": 512}}}\'',
    )
    parser.add_argument(
        "--concurrency",
        type=parse_at_least(1),
        default=8,
        help="requests at once to each server (default: %(default)s)",
    )
    parser.add_argument(
        "--timeout",
        type=parse_at_least(1),
        default=600,
        metavar="SECONDS",
        help="for an answer; it is asked for up to three times (default: %(default)s)",
    )


def _add_question_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tasks",
        type=parse_tasks,
        default="ruler",
        help=f"names of tasks, or all of {', '.join(SUITES)} (default: %(default)s)",
    )
    parser.add_argument(
        "--lengths",
        type=parse_list(1),
        default="4096,8192,16384",
        help="tokens of prompt and answer together (default: %(default)s)",
    )
    parser.add_argument("--seeds", type=parse_list(0), default="0", help="of the questions (default: %(default)s)")
    parser.add_argument(
        "--samples", type=parse_at_least(1), default=11, help="of each task, length and seed (default: %(default)s)"
    )
    parser.add_argument(
        "--depths",
        type=parse_at_least(0),
        help="steps from the start of the text to its end that the one fact asked for stands at in turn; 0: anywhere, "
        f"so that more questions share a text, without a heat map (default: as many as samples, at most {MAX_DEPTHS})",
    )


def depths_of(args: argparse.Namespace) -> int:
    return min(args.samples, MAX_DEPTHS) if args.depths is None else args.depths


def named_urls(args: argparse.Namespace) -> dict[str, str]:
    """URLs by name.

    Raises:
        SystemExit: not one name for each server, or one for both.
    """
    urls = args.compare or [args.url]
    names = args.names or DEFAULT_NAMES[len(urls)]
    if len(names) != len(urls) or len(set(names)) != len(names):
        raise SystemExit(f"--names: expected {len(urls)} different ones, got {' '.join(names)}")
    return dict(zip(names, urls, strict=True))


def parse_tasks(text: str) -> tuple[str, ...]:
    """'needle,passkey' to the names of all tasks of suite needle, and passkey."""
    names: list[str] = []
    for part in text.split(","):
        found = [part] if part in TASKS else [name for name, task in TASKS.items() if task.suite == part]
        if not found:
            raise argparse.ArgumentTypeError(f"expected names of {', '.join((*SUITES, *TASKS))}; got {part!r}")
        names += found
    return tuple(dict.fromkeys(names))


def parse_list(least: int) -> Callable[[str], tuple[int, ...]]:
    """A parser of integers with commas between them, each once."""

    def parse(text: str) -> tuple[int, ...]:
        parts = text.split(",")
        if not all(part.isdecimal() and int(part) >= least for part in parts):
            raise argparse.ArgumentTypeError(f"expected integers from {least} on, such as 4096,8192; got {text!r}")
        return tuple(dict.fromkeys(map(int, parts)))

    return parse


def parse_at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected an integer from {least} on, got {text!r}")
        return int(text)

    return parse


def parse_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}")
    return value
