# SPDX-License-Identifier: Apache-2.0
"""Types of command line options."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable


def parse_within(bounds: range) -> Callable[[str], int]:
    """A parser of integers in `bounds`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) not in bounds:
            raise argparse.ArgumentTypeError(f"expected an integer from {bounds.start} to {bounds[-1]}, got {text!r}")
        return int(text)

    return parse


def parse_above_zero(what: str, most: float = sys.float_info.max) -> Callable[[str], float]:
    """A parser of numbers above 0.

    Args:
        what: they are, for the message.
    """
    bounds = "above 0" if most == sys.float_info.max else f"above 0 and up to {most}"

    def parse(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = 0.0
        if not 0.0 < number <= most:
            raise argparse.ArgumentTypeError(f"expected {what} {bounds}, got {text!r}")
        return number

    return parse
