# SPDX-License-Identifier: Apache-2.0
"""The options of commands that ask a server of their own, which records: what it serves, and on what."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from sglang_tokenselect.needle_server import DEVICES


@dataclass(frozen=True)
class ServerOptions:
    """
    Attributes:
        model_path: None is the shipped checkpoint.
        device: of the shipped checkpoint's server.
        flags: more flags of sglang.launch_server; they win over all others but those of the recording.
    """

    model_path: str | None = None
    device: str = "cpu"
    flags: tuple[str, ...] = ()

    @classmethod
    def of(cls, args: argparse.Namespace) -> ServerOptions:
        """
        Raises:
            SystemExit: a device for a model of the user's, whose server has all its flags behind `--`.
        """
        if args.model_path is not None and args.device is not None:
            raise SystemExit(f"--device: expected none beside --model-path but behind --, got {args.device}")
        return cls(args.model_path, args.device or "cpu", tuple(args.server_flags))


def add_server_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model-path", metavar="MODEL", help="served instead of the shipped checkpoint")
    parser.add_argument("--device", choices=DEVICES, help="that the shipped checkpoint is served on (default: cpu)")
    parser.add_argument("server_flags", nargs="*", metavar="-- FLAG", help="more flags of sglang.launch_server")


def read_prompt(file: Path, option: str) -> str:
    """The text of a file as it is, line ends included.

    Args:
        option: that named the file.

    Raises:
        SystemExit: no such file, or no text.
    """
    try:
        return file.read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise SystemExit(f"{option}: expected a text file, got {file} ({error})") from None
