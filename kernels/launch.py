# SPDX-License-Identifier: Apache-2.0
"""Programmatic dependent launch: a kernel is set up while the one before it ends (Hopper and later)."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """First line of every kernel: nothing is read or written before the kernels before it are done."""
    if PDL:
        gdc_wait()


@triton.jit
def start_next(PDL: tl.constexpr):
    """The next kernel may take the places that this one frees; it waits there until this one is done."""
    if PDL:
        gdc_launch_dependents()
