# SPDX-License-Identifier: Apache-2.0
"""Programmatic dependent launch: a kernel is set up while the one before it ends (Hopper and later)."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """What the launch before this one writes may be read from here on, and what it reads may be written.

    Every kernel comes here, and says :func:`start_next` at the earliest here, or has not read anything of the launch
    before it. So before this line, a kernel may read what was there before the launch before it.
    """
    if PDL:
        gdc_wait()


@triton.jit
def start_next(PDL: tl.constexpr):
    """The next kernel may take the places that this one frees; it waits there until this one is done."""
    if PDL:
        gdc_launch_dependents()
