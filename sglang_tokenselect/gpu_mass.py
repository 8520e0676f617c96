# SPDX-License-Identifier: Apache-2.0
"""Samples of attention mass on a GPU: of one layer and one request, beside the CUDA graphs, nobody waiting.

In the step that is sampled the layer keeps its queries. Before the next step of the same request, whose cache entry and
keys still are what they were, a dense pass tells what the selection held.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from sglang_tokenselect.config import TokenSelectConfig
from sglang_tokenselect.device_reads import DeviceReads
from sglang_tokenselect.effort import Effort
from sglang_tokenselect.kernels.cached_positions import attended_positions
from sglang_tokenselect.kernels.reference.mass import candidate_mass
from sglang_tokenselect.kernels.selection_cache import SelectionCaches
from sglang_tokenselect.mass_sampling import MassSampling
from sglang_tokenselect.planner import RequestPlan
from sglang_tokenselect.runner import LayerInput

NO_LAYER = -1


@dataclass(frozen=True)
class _Sample:
    """What was sampled: the request and its place in the step's batch, its cache entry, the layer, the effort."""

    request: RequestPlan
    batch_row: int
    cache_slot: int
    layer: int
    effort: Effort


class GpuMass:
    """Chooses what is sampled, and measures it one decode step later."""

    def __init__(
        self,
        config: TokenSelectConfig,
        caches: SelectionCaches,
        queries: torch.Tensor,
        req_to_token: torch.Tensor,
        layers: Sequence[Callable[[], LayerInput]],
    ) -> None:
        """
        Args:
            queries: [max_rows, num_qo_heads * head_dim], where a layer keeps those of a step (Probe.query).
            req_to_token: [num_rows, max_context_len] int32, the slot of each position of each row.
            layers: what each layer that selects reads now; its pool may not be the one it had at start.
        """
        self._config, self._caches, self._queries, self._layers = config, caches, queries, layers
        self._req_to_token = req_to_token
        self._sampling = MassSampling(config.mass_every, len(layers))
        self._sample: _Sample | None = None
        self._reads, self._levels = DeviceReads(), deque[int]()

    def choose(self, requests: Sequence[RequestPlan], cache_slots: Sequence[int], effort: Effort) -> int:
        """The layer that has to keep its queries in this decode step, counted among those that select, or NO_LAYER.

        Requests with a window of their own are not sampled: the samples judge the effort.
        """
        sampled = [i for i, slot in enumerate(cache_slots) if slot >= 0 and requests[i].window is None]
        chosen = self._sampling.choose(len(sampled))
        if chosen is None:
            return NO_LAYER
        layer, row = chosen[0], sampled[chosen[1]]
        self._sample = _Sample(requests[row], row, cache_slots[row], layer, effort)
        return layer

    def measure(self, requests: Sequence[RequestPlan]) -> None:
        """Measures the last sample if its request goes on in this decode step; else it is forgotten."""
        sample, self._sample = self._sample, None
        if sample is not None and any(_follows(request, sample.request) for request in requests):
            self._reads.start(self._mass(sample))
            self._levels.append(sample.effort.level)

    def forget(self, requests: Sequence[RequestPlan]) -> None:
        """These begin anew in their rows."""
        if self._sample is not None and self._sample.request.req_pool_idx in [r.req_pool_idx for r in requests]:
            self._sample = None

    def take(self) -> list[tuple[float, int]]:
        """Shares that have arrived on the host, each with its level; see Runner.masses."""
        return [(share, self._levels.popleft()) for share in self._reads.finished()]

    def _mass(self, sample: _Sample) -> torch.Tensor:
        config, request = self._config, sample.request
        layer, sizes = self._layers[sample.layer](), {"num_sink": config.sink, "num_local": config.local}
        cache = self._caches.layer(sample.layer)
        is_attended = attended_positions(cache, sample.cache_slot, request.seq_len, sample.effort.budget, **sizes)
        return candidate_mass(
            self._queries[sample.batch_row].view(-1, layer.key_pool.shape[-1]),
            layer.key_pool,
            self._req_to_token[request.req_pool_idx, : request.seq_len],
            is_attended,
            scaling=layer.scaling * layer.k_scale,
            logit_cap=layer.logit_cap,
            **sizes,
        )


def _follows(request: RequestPlan, sampled: RequestPlan) -> bool:
    return request.req_pool_idx == sampled.req_pool_idx and request.seq_len == sampled.seq_len + 1
