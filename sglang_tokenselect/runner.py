# SPDX-License-Identifier: Apache-2.0
"""What the backend asks of a runner: TorchRunner on a CPU, GpuRunner on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch

from sglang_tokenselect.config import TokenSelectConfig
from sglang_tokenselect.counters import Counters
from sglang_tokenselect.effort import Effort, effort_at
from sglang_tokenselect.kernels.reference.kv import RequestKV
from sglang_tokenselect.kernels.reference.positions import Rope
from sglang_tokenselect.kernels.reference.window import Window
from sglang_tokenselect.kernels.shared_segment import SharedSegment
from sglang_tokenselect.patches import kv_scales
from sglang_tokenselect.planner import ForwardPlan, RequestPlan

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch


class Graph(Enum):
    """What a decode step has to do with a CUDA graph."""

    NONE = "none"
    CAPTURE = "capture"
    REPLAY = "replay"


class Step(Enum):
    """What a decode step does; each kind has CUDA graphs of its own."""

    EVERYTHING = "everything"
    SELECTS = "selects"
    SHARES = "shares"
    """Selects, and scores what requests share once for all of them."""


@dataclass(frozen=True)
class LayerInput:
    """What a layer hands to the runner; made by `of_pool` where the keys are in SGLang's pool.

    Attributes:
        layer_id: of the model, from 0.
        key_pool: [num_slots, num_kv_heads, head_dim], keys of this forward written already.
        value_pool: as `key_pool`.
        scaling: factor of the attention's logits.
        logit_cap: tanh soft cap of the attention's logits, 0 for none.
        k_scale, v_scale: factors of the stored keys and values; others than 1 for float8 alone.
    """

    layer_id: int
    key_pool: torch.Tensor
    value_pool: torch.Tensor
    scaling: float
    logit_cap: float
    k_scale: float = 1.0
    v_scale: float = 1.0

    @classmethod
    def of_pool(cls, pool: Any, layer: RadixAttention) -> LayerInput:
        """
        Args:
            pool: SGLang's KVCache.
            layer: its scales as patches/kv_scales.py has set them.
        """
        return cls(
            layer.layer_id,
            pool.get_key_buffer(layer.layer_id),
            pool.get_value_buffer(layer.layer_id),
            layer.scaling,
            layer.logit_cap,
            *kv_scales.read_scales(layer),
        )

    def request_kv(self, slots: torch.Tensor) -> RequestKV:
        """
        Args:
            slots: [seq_len] integer, the slot of each position of a request.
        """
        return RequestKV(self.key_pool, self.value_pool, slots, self.k_scale, self.v_scale)


class Runner:
    """Selection and attention of one model. What is the same without graphs and without delegation is here.

    Attributes:
        config: as the server was started.
        counters: so far, as far as they are known on the host; a GPU's own as of the last `refresh_counters`.
        masses: samples of attention mass that nobody took yet: the share of the candidates' that the chosen tokens hold
            (kernels/reference/mass.py), and the effort level at which they were chosen.
        samples_mass: whether somebody wants samples.
        effort: of decode steps from the next one on.
        decode_window: of decode queries of requests without a window of their own, at this effort.
        dense: an AttentionBackend for what is delegated; None where nothing is.
        selects: whether any request of the current forward may select.
        min_group: requests that must share a prefix for it to be scored once for all; 0: never.
    """

    dense: Any = None
    selects: bool = True

    def __init__(self, config: TokenSelectConfig) -> None:
        self.config, self.counters, self.min_group = config, Counters(), config.min_group
        self.masses: list[tuple[float, int]] = []
        self.samples_mass = False
        self.set_effort(effort_at(config, 0))

    def set_effort(self, effort: Effort) -> None:
        """Costs nothing on the device: the numbers travel with the next step, kept selections are cut by rank."""
        self.effort = effort
        self.decode_window = replace(self.config.window, budget=effort.budget, min_len=effort.min_len)
        self._decode_dense_len = self.decode_window.dense_len

    def decode_window_of(self, request: RequestPlan) -> Window:
        return request.window or self.decode_window

    def extend_window_of(self, request: RequestPlan) -> Window:
        """Whatever the effort: the radix cache keeps what prefill writes, and would serve a busy minute's for hours."""
        return request.window or self.config.window

    def begin(
        self, plan: ForwardPlan, forward_batch: ForwardBatch, graph: Graph = Graph.NONE, *, step: Step | None = None
    ) -> None:
        """Once per forward, before its first layer.

        Args:
            step: at capture, what the graph is to do; otherwise the requests tell.
        """
        raise NotImplementedError

    def run(self, query: torch.Tensor, layer: LayerInput) -> torch.Tensor:
        """Attention of all queries of the current forward in one layer that is not delegated.

        Args:
            query: [num_tokens, num_qo_heads, head_dim]; un-rotated in compact mode.

        Returns:
            [num_tokens, num_qo_heads, head_dim].
        """
        raise NotImplementedError

    def report(self) -> Counters:
        """Counters so far; may wait for the device."""
        return self.counters

    @property
    def lent_entries(self) -> int:
        """Requests whose decode selections are kept; those that ended are among them until their row is used again."""
        raise NotImplementedError

    def take_masses(self) -> list[tuple[float, int]]:
        """Samples since the last call."""
        masses, self.masses = self.masses, []
        return masses

    def refresh_counters(self) -> None:
        """Has the device send its counters, without waiting for them."""

    def attended_positions(self, request: RequestPlan, layer_id: int) -> torch.Tensor | None:
        """What the query of a decode step attended to in a layer, until the next layer runs.

        Returns:
            [t] int64 ascending; None: everything.
        """
        raise NotImplementedError

    def rope_of(self, layer_id: int) -> Rope | None:
        """What rotates queries and keys of a layer; None with absolute positions, where the model does."""
        raise NotImplementedError

    def delegates(self, layer_id: int) -> bool:
        """Whether `dense` attends in this layer of the current forward."""
        return False

    def reserve_graph_rows(self, max_rows: int, max_context_len: int) -> None:
        """Memory for CUDA graphs of up to `max_rows` requests; those captured before are not replayed again."""

    def decode_selects(self, seq_lens: Sequence[int], windows: Sequence[Window | None] = ()) -> bool:
        """Whether a decode step of such requests has to select at all.

        Args:
            windows: see RequestPlan.window; None for all that are not there.
        """
        if not windows:
            return max(seq_lens, default=0) > self._decode_dense_len
        return any(n > (own or self.decode_window).dense_len for n, own in zip_longest(seq_lens, windows))

    def decode_step(
        self,
        seq_lens: Sequence[int],
        windows: Sequence[Window | None] = (),
        shared: tuple[SharedSegment, ...] = (),
    ) -> Step:
        """What a decode step of such requests does.

        Args:
            windows: see decode_selects.
            shared: see ForwardPlan.shared.
        """
        return Step.SELECTS if self.decode_selects(seq_lens, windows) else Step.EVERYTHING

    def fits_graph(
        self,
        seq_lens: Sequence[int],
        windows: Sequence[Window | None] = (),
        shared: tuple[SharedSegment, ...] = (),
    ) -> bool:
        """Whether a captured graph can serve such a decode step; for the arguments see decode_step."""
        return False
