# SPDX-License-Identifier: Apache-2.0
"""A sample of attention mass: what one costs a decode step, once every `--tokenselect-mass-every` of them."""

from __future__ import annotations

import torch

from bench.kernels.decode import row
from bench.kernels.layers import DTYPE, HEAD_DIM, WINDOW, Shape
from bench.kernels.timing import time_eager
from sglang_tokenselect.kernels.cached_positions import attended_positions
from sglang_tokenselect.kernels.reference.mass import candidate_mass
from sglang_tokenselect.kernels.selection_cache import SelectionCache

SHAPES = [Shape(1, 32_768), Shape(1, 131_072)]


def measure(shape: Shape) -> list[dict[str, object]]:
    """One request, one layer: what it attended to is read back from its cache entry, then the dense pass."""
    device, num_slots = "cuda", 2 * shape.context
    pool = torch.randn(num_slots, shape.num_kv_heads, HEAD_DIM, device=device, dtype=DTYPE)
    query = torch.randn(shape.num_qo_heads, HEAD_DIM, device=device, dtype=DTYPE)
    slots = torch.randperm(num_slots, device=device)[: shape.context].int()
    cache = SelectionCache.create(1, shape.num_qo_heads * HEAD_DIM, WINDOW.budget, DTYPE, device)
    candidates = torch.randperm(shape.context - WINDOW.size, device=device)[: WINDOW.budget].sort().values
    cache.vote[0] = (1 << 32) | (2**31 - 1 - candidates)
    cache.vote_len.fill_(WINDOW.budget)
    cache.seq_len.fill_(shape.context - 5)
    sizes = {"num_sink": WINDOW.num_sink, "num_local": WINDOW.num_local}

    def sample() -> torch.Tensor:
        is_attended = attended_positions(cache, 0, shape.context, WINDOW.budget, **sizes)
        return candidate_mass(query, pool, slots, is_attended, scaling=HEAD_DIM**-0.5, **sizes)

    return [row("mass", "a sample of attention mass", shape, time_eager(sample))]
