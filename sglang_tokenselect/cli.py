# SPDX-License-Identifier: Apache-2.0
"""The command `sglang-tokenselect`: one subcommand per entry of `COMMANDS`."""

from __future__ import annotations

import argparse
import io
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sglang_tokenselect.demo_questions import LENGTHS, QUESTIONS, SEEDS
from sglang_tokenselect.doctor import options as doctor_options
from sglang_tokenselect.evaluation import options as evaluation_options
from sglang_tokenselect.fidelity import options as fidelity_options
from sglang_tokenselect.parsers import parse_above_zero, parse_within
from sglang_tokenselect.trace import options as trace_options

DEFAULT_LENGTHS = (4096, 8192, 16384, 32768)
DEFAULT_PUBLISH = "tcp://127.0.0.1:30100"
DEFAULT_CONTROL = "tcp://127.0.0.1:30101"
DEFAULT_TIMEOUT = 5.0
MAX_SECONDS = 86400


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    # A console that cannot show a character shows `?` in its place.
    if isinstance(sys.stdout, io.TextIOWrapper):
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


def parse_endpoint(text: str) -> str:
    # Only here, since it imports what takes two seconds: torch.
    from sglang_tokenselect.config import ConfigError, check_endpoint

    try:
        check_endpoint("endpoint", text, allow_remote=True)
    except ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _parse_setting(text: str) -> tuple[str, Any]:
    from sglang_tokenselect.ctl import parse_setting

    return parse_setting(text)


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


def _add_monitor_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "endpoint",
        nargs="?",
        type=parse_endpoint,
        default=DEFAULT_PUBLISH,
        help="what the server was given as --tokenselect-publish (default: %(default)s)",
    )
    parser.add_argument("--once", action="store_true", help="shows the first message and ends")
    parser.add_argument("--json", action="store_true", help="prints the messages, one per line")
    _add_timeout(parser, "--once: seconds to wait for a message")


def _run_monitor(args: argparse.Namespace) -> int:
    from sglang_tokenselect.monitor import run_monitor

    return run_monitor(args.endpoint, once=args.once, as_json=args.json, timeout=args.timeout)


def _add_ctl_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--endpoint",
        type=parse_endpoint,
        default=DEFAULT_CONTROL,
        help="what the server was given as --tokenselect-control (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="prints the server's answer")
    _add_timeout(parser, "seconds to wait for the answer")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    commands.add_parser("get", help="shows the options that can be changed")
    setter = commands.add_parser("set", help="changes options, all of them or none")
    setter.add_argument("settings", nargs="+", type=_parse_setting, metavar="NAME=VALUE", help="such as policy=load")


def _run_ctl(args: argparse.Namespace) -> int:
    from sglang_tokenselect.ctl import run_ctl

    request: dict[str, Any] = {"command": args.command}
    if args.command == "set":
        request["options"] = dict(args.settings)
    return run_ctl(request, args.endpoint, as_json=args.json, timeout=args.timeout)


def _run_trace(args: argparse.Namespace) -> int:
    from sglang_tokenselect.trace.command import run_trace

    return run_trace(trace_options.TraceOptions.of(args))


def _run_eval(args: argparse.Namespace) -> int:
    from sglang_tokenselect.evaluation.command import run_eval

    return run_eval(args)


def _run_doctor(args: argparse.Namespace) -> int:
    from sglang_tokenselect.doctor.command import run_doctor

    return run_doctor(args)


def _run_fidelity(args: argparse.Namespace) -> int:
    from sglang_tokenselect.fidelity.command import run_fidelity

    return run_fidelity(fidelity_options.FidelityOptions.of(args))


def _add_timeout(parser: argparse.ArgumentParser, help: str) -> None:
    parser.add_argument(
        "--timeout",
        type=parse_above_zero("seconds", MAX_SECONDS),
        default=DEFAULT_TIMEOUT,
        metavar="SECONDS",
        help=f"{help} (default: %(default)s)",
    )


def _exit_on_signal(signum: int, frame: object) -> None:
    sys.exit(128 + signum)


COMMANDS = {
    "demo": (
        "Starts SGLang on the shipped checkpoint, sparse and dense, and asks both about long texts.",
        _add_demo_options,
        _run_demo,
    ),
    "monitor": (
        "Shows a server's effort level, speed and what it attends to, as it changes.",
        _add_monitor_options,
        _run_monitor,
    ),
    "ctl": (
        "Shows or changes a running server's options.",
        _add_ctl_options,
        _run_ctl,
    ),
    "eval": (
        "Asks any OpenAI-compatible server about long texts of synthetic tasks, and scores what it answers.",
        evaluation_options.add_options,
        _run_eval,
    ),
    "trace": (
        "Asks a server one prompt and writes a page that shows what each step of the answer attended to.",
        trace_options.add_options,
        _run_trace,
    ),
    "fidelity": (
        "Measures, layer by layer, how much of a model's dense attention a selection keeps, and what should be dense.",
        fidelity_options.add_options,
        _run_fidelity,
    ),
    "doctor": (
        "Tells versions, GPUs, plugin and hooks, and what a server with the given flags would need or be refused for.",
        doctor_options.add_options,
        _run_doctor,
    ),
}

if __name__ == "__main__":
    sys.exit(main())
