# SPDX-License-Identifier: Apache-2.0
"""The options of `sglang-tokenselect trace`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from sglang_tokenselect.parsers import parse_within
from sglang_tokenselect.recording.options import ServerOptions, add_server_options

TOKENS = range(2, 1025)
DEFAULT_TOKENS = 32


@dataclass(frozen=True)
class TraceOptions:
    """What to trace. Without a model the shipped checkpoint, without a prompt a needle question for it.

    Attributes:
        out: the page.
        mark: a text of the prompt file to mark.
        num_tokens: of the answer, at most; None: as the prompt has it.
    """

    out: Path
    server: ServerOptions = ServerOptions()
    prompt: Path | None = None
    mark: str | None = None
    num_tokens: int | None = None

    @classmethod
    def of(cls, args: argparse.Namespace) -> TraceOptions:
        return cls(args.out, ServerOptions.of(args), args.prompt, args.mark, args.tokens)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the page, such as trace.html")
    parser.add_argument("--prompt", type=Path, metavar="FILE", help="a text to ask (default: a needle question)")
    parser.add_argument("--mark", metavar="TEXT", help="marks this text wherever the prompt has it")
    parser.add_argument(
        "--tokens",
        type=parse_within(TOKENS),
        metavar="N",
        help=f"of the answer, at most (default: {DEFAULT_TOKENS}; of the needle question as many as its answer has)",
    )
    add_server_options(parser)
