# SPDX-License-Identifier: Apache-2.0
"""The command `sglang-tokenselect`: one subcommand per entry of `COMMANDS`."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from sglang_tokenselect.demo_questions import LENGTHS, QUESTIONS, SEEDS

DEFAULT_LENGTHS = (4096, 8192, 16384, 32768)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    # A console that cannot show a character shows `?` in its place.
    sys.stdout.reconfigure(errors="replace")
    # Ended from outside, a command still stops what it started.
    signal.signal(signal.SIGTERM, _exit_on_signal)
    args = build_parser().parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sglang-tokenselect", description="TokenSelect attention for SGLang.")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (summary, add_options, run) in COMMANDS.items():
        subparser = subparsers.add_parser(name, help=summary, description=summary)
        add_options(subparser)
        subparser.set_defaults(run=run)
    return parser


def parse_lengths(text: str) -> tuple[int, ...]:
    """'4096,8192' to (4096, 8192)."""
    try:
        lengths = tuple(int(part) for part in text.split(","))
    except ValueError:
        lengths = ()
    if not lengths or not all(length in LENGTHS for length in lengths):
        expected = f"token counts from {LENGTHS.start} to {LENGTHS[-1]}, such as 4096,8192"
        raise argparse.ArgumentTypeError(f"expected {expected}; got {text!r}")
    return lengths


def parse_within(bounds: range) -> Callable[[str], int]:
    """A parser of integers in `bounds`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) not in bounds:
            raise argparse.ArgumentTypeError(f"expected an integer from {bounds.start} to {bounds[-1]}, got {text!r}")
        return int(text)

    return parse


def _add_demo_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lengths",
        type=parse_lengths,
        default=DEFAULT_LENGTHS,
        help=f"tokens of each context with a question (default: {','.join(map(str, DEFAULT_LENGTHS))})",
    )
    parser.add_argument(
        "--questions", type=parse_within(QUESTIONS), default=4, help="about each context (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=parse_within(SEEDS), default=0, help="of contexts and needles (default: %(default)s)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes the rows to FILE")
    parser.add_argument("--model-path", type=Path, help="another checkpoint with the same tokenizer")


def _run_demo(args: argparse.Namespace) -> int:
    # Only here, since it imports what takes a second: the OpenAI client and rich.
    from sglang_tokenselect.demo import DemoOptions, run_demo

    options = DemoOptions(
        lengths=args.lengths,
        num_questions=args.questions,
        seed=args.seed,
        json_path=args.json,
        model_path=args.model_path,
    )
    return run_demo(options)


def _exit_on_signal(signum: int, frame: object) -> None:
    sys.exit(128 + signum)


COMMANDS = {
    "demo": (
        "Starts SGLang on the shipped checkpoint, sparse and dense, and asks both about long texts.",
        _add_demo_options,
        _run_demo,
    ),
}

if __name__ == "__main__":
    sys.exit(main())
