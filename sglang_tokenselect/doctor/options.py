# SPDX-License-Identifier: Apache-2.0
"""The options of `sglang-tokenselect doctor`."""

from __future__ import annotations

import argparse


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model-path", metavar="MODEL", help="that a server would be given (default: none is planned)")
    parser.add_argument("--json", action="store_true", help="prints the report as JSON")
    parser.add_argument("server_flags", nargs="*", metavar="-- FLAG", help="flags of sglang.launch_server")
