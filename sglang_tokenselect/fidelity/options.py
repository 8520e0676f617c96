# SPDX-License-Identifier: Apache-2.0
"""The options of `sglang-tokenselect fidelity`."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from sglang_tokenselect.parsers import parse_above_zero, parse_within
from sglang_tokenselect.recording.options import ServerOptions, add_server_options

STEPS = range(1, 1025)


@dataclass(frozen=True)
class FidelityOptions:
    """
    Attributes:
        out: folder of the CSV and the figure.
        server: what is measured.
        prompts: text files; none: needle questions, for the shipped checkpoint alone.
        num_steps: decode steps of each prompt.
        max_error: mean output error of a layer that selects.
    """

    out: Path
    server: ServerOptions
    prompts: tuple[Path, ...]
    num_steps: int
    max_error: float

    @classmethod
    def of(cls, args: argparse.Namespace) -> FidelityOptions:
        return cls(args.out, ServerOptions.of(args), tuple(args.prompts), args.tokens, args.max_error)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of fidelity.csv and .png")
    parser.add_argument(
        "--prompts", type=Path, nargs="+", default=(), metavar="FILE", help="texts to ask (default: needle questions)"
    )
    parser.add_argument(
        "--tokens",
        type=parse_within(STEPS),
        default=8,
        metavar="N",
        help="decode steps of each prompt (default: %(default)s)",
    )
    parser.add_argument(
        "--max-error",
        type=parse_above_zero("a number"),
        default=0.1,
        metavar="SHARE",
        help="relative output error, mean of a layer's heads, beyond which it should be dense (default: %(default)s)",
    )
    add_server_options(parser)
