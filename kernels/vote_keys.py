# SPDX-License-Identifier: Apache-2.0
"""Scores as keys that are never equal, and the search for the least key to be chosen.

A *vote key* is ``(bits of the float32 score << 32) | (2**31 - 1 - candidate)``. Scores are not negative, so keys
order as scores do, ties go to the lower position, and no two keys are equal.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = 4096
"""Keys that a program of a search holds in registers."""


@triton.jit
def vote_keys(scores, candidates, valid):
    """Keys of scores, -1 where not valid. What is not a number ranks first or last."""
    bits = tl.minimum(tl.maximum(scores.to(tl.int32, bitcast=True), 0), 0x7F800000).to(tl.int64)
    return tl.where(valid, (bits << 32) | (0x7FFFFFFF - candidates), -1)


@triton.jit
def _half(keys, top, TIES: tl.constexpr):
    """What is searched, in 32 bits: the score's bits of each key, or the lower half of those that tie at ``top``."""
    bits = (keys >> 32).to(tl.int32)
    if TIES:
        return tl.where(bits == top, (keys & 0x7FFFFFFF).to(tl.int32), -1)
    return bits


@triton.jit
def _count(held, keys_ptr, num_keys, top, threshold, TIES: tl.constexpr, BLOCK: tl.constexpr):
    """Keys that reach the threshold: the first BLOCK are held in registers, more are read again."""
    count = tl.sum((_half(held, top, TIES) >= threshold).to(tl.int32))
    for start in range(BLOCK, num_keys, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        keys = tl.load(keys_ptr + offs, mask=offs < num_keys, other=-1)
        count += tl.sum((_half(keys, top, TIES) >= threshold).to(tl.int32))
    return count


@triton.jit
def _bisect(held, keys_ptr, num_keys, top, wanted, slack, TIES: tl.constexpr, BLOCK: tl.constexpr):
    """Largest threshold found that ``wanted`` keys reach, and how many do."""
    most = 0x7FFFFFFF
    half = _half(held, top, TIES)
    # All are between the least and the largest, if all are held.
    low = tl.where(num_keys > BLOCK, 0, tl.min(tl.where(half >= 0, half, most)))
    high = tl.where(num_keys > BLOCK, most, tl.maximum(tl.max(half), 0) + 1)
    count = _count(held, keys_ptr, num_keys, top, low, TIES, BLOCK)
    while (count > wanted + slack) & (high - low > 1):
        middle = low + ((high - low) >> 1)
        reached = _count(held, keys_ptr, num_keys, top, middle, TIES, BLOCK)
        if reached >= wanted:
            low = middle
            count = reached
        else:
            high = middle
    return low, count


@triton.jit
def find_threshold(held, keys_ptr, num_keys, wanted, slack, BLOCK: tl.constexpr):
    """A key that ``wanted`` to ``wanted + slack`` of the keys reach; wanted is at most num_keys.

    First by score alone, in 32 bits; only if ties are left between too few and too many, by position.
    """
    top, count = _bisect(held, keys_ptr, num_keys, 0, wanted, slack, False, BLOCK)
    lower_half = tl.zeros([], tl.int32)
    if count > wanted + slack:
        above = _count(held, keys_ptr, num_keys, 0, top + 1, False, BLOCK)
        lower_half, _ = _bisect(held, keys_ptr, num_keys, top, wanted - above, slack, True, BLOCK)
    return (top.to(tl.int64) << 32) | lower_half
