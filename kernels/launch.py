# SPDX-License-Identifier: Apache-2.0
"""Programmatic dependent launch: a kernel is set up while the one before it ends (Hopper and later)."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """What the launch before this one writes may be read from here on, and what it reads may be written.

    Every program of every kernel comes here before it ends. Before this line, a kernel may touch what the second launch
    before it left, or the third before it, where the launch before it says :func:`start_next` ahead of its own wait.
    It must then not be read through L1, which may hold what was there in the layer before: `cache_modifier=".cg"`.
    """
    if PDL:
        gdc_wait()


@triton.jit
def start_next(PDL: tl.constexpr):
    """The next kernel may take the places that this one frees; it waits there until this one is done."""
    if PDL:
        gdc_launch_dependents()
