# SPDX-License-Identifier: Apache-2.0
"""Types of command line options."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable


def parse_within(bounds: range) -> Callable[[str], int]:
    """A parser of integers in `bounds`."""

    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) not in bounds:
            raise argparse.ArgumentTypeError(f"expected an integer from {bounds.start} to {bounds[-1]}, got {text!r}")
        return int(text)

    return parse


def parse_share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0.0 < share < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return share
