# SPDX-License-Identifier: Apache-2.0
"""A snapshot to vary with `dataclasses.replace`."""

from __future__ import annotations

from sglang_tokenselect.snapshot import Snapshot

SNAPSHOT = Snapshot(
    time=1.7e9,
    policy="slo",
    level=1,
    highest_level=-1,
    lowest_level=4,
    budget=2048,
    theta=0.8,
    max_reuse=64,
    itl_ms=9.25,
    itl_target_ms=9.5,
    running=16,
    waiting=3,
    kv_usage=0.625,
    mass=0.951,
    min_mass=0.9,
    level_changes=12,
    attended_share=0.021,
    hit_ratio=0.75,
    counters={
        "decode_queries": 1000,
        "cached_tokens": 100_000,
        "attended_tokens": 2100,
        "dense_queries": 10,
        "votes": 250,
        "reuses": 750,
        "uncached_queries": 5,
        "shared_queries": 300,
        "block_votes": 40,
    },
)
