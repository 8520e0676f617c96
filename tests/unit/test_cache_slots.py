# SPDX-License-Identifier: Apache-2.0
"""Entries of the selection cache: one holder each, kept while it runs, never two at once."""

from __future__ import annotations

import random

from sglang_tokenselect.cache_slots import CacheSlots


def test_a_row_keeps_its_entry_and_a_new_one_is_told():
    slots = CacheSlots(2)
    assert slots.lend([7]) == ([0], [0])
    assert slots.lend([7, 5]) == ([0, 1], [1])
    assert slots.lend([5]) == ([1], [])
    assert slots.lend([7, 5]) == ([0, 1], [])
    assert slots.num_lent == 2
    slots.release([7, 9])
    assert slots.num_lent == 1


def test_rows_beyond_the_entries_have_none():
    slots = CacheSlots(1)
    assert slots.lend([3, 4]) == ([0, -1], [0])
    assert CacheSlots(0).lend([3]) == ([-1], [])


def test_entries_of_rows_that_no_longer_run_go_to_others():
    slots = CacheSlots(1)
    slots.lend([3])
    assert slots.lend([4]) == ([0], [0])
    assert slots.lend([3, 4]) == ([-1, 0], [])


def test_a_prefill_ends_what_its_row_had():
    slots = CacheSlots(1)
    slots.lend([3])
    slots.release([3, 9])
    assert slots.lend([3]) == ([0], [0])


def test_no_entry_has_two_holders():
    rng, slots, holder = random.Random(0), CacheSlots(5), {}
    for _ in range(500):
        if rng.random() < 0.2:
            released = rng.sample(range(12), 3)
            slots.release(released)
            holder = {slot: row for slot, row in holder.items() if row not in released}
        rows = rng.sample(range(12), rng.randint(1, 9))
        lent, fresh = slots.lend(rows)
        held = [slot for slot in lent if slot >= 0]
        assert len(set(held)) == len(held) == min(len(rows), 5)
        for row, slot in zip(rows, lent, strict=True):
            if slot >= 0 and slot not in fresh:
                assert holder[slot] == row
            if slot >= 0:
                holder[slot] = row
