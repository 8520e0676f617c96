# SPDX-License-Identifier: Apache-2.0
"""Device memory of the GPU runner: sized from the model and the flags, allocated once at start.

The same code allocates on the "meta" device to tell the bytes before the KV pool is sized.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from sglang_tokenselect.config import TokenSelectConfig
from sglang_tokenselect.kernels.block_plan import BlockScratch, count_rows_per_block
from sglang_tokenselect.kernels.rows import SelectionRows
from sglang_tokenselect.kernels.selection_cache import SelectionCaches
from sglang_tokenselect.kernels.shared_plan import SharedPrefixes
from sglang_tokenselect.kernels.transfer import ALIGNMENT
from sglang_tokenselect.kernels.vote_exchange import ExchangeLayout
from sglang_tokenselect.kernels.workspace import TILE, DecodeWorkspace, WorkspaceLimits, nbytes
from sglang_tokenselect.model_shape import ModelShape

if TYPE_CHECKING:
    from sglang.srt.configs.model_config import ModelConfig

OWN_CANDIDATES = 2 * 2**20
"""Tokens that the requests of a decode step score by themselves in one part.

A step with more leaves the CUDA graph and takes several parts; so does one with more than CANDIDATES in all.
"""

CANDIDATES = 8 * 2**20
"""Tokens that a decode step, block times token pairs that a prefill selects from in one part.

Of the latter as many as a chunk of 8,192 has at a context of 131,072.
"""

PREFILL_BLOCKS = 128
"""Blocks of one part."""

ROW_VOTES_BYTES = 256 * 2**20
"""Of a prefill's votes that ranks add up at once, unless the longest request takes more."""

MOST_RUNNING_REQUESTS = 4096
"""What SGLang clamps --max-running-requests to when it is not given."""

STEP_SECTIONS = 4
"""What changes from one decode step to the next: kv_indptr, budgets, cache slots, and three scalars."""

INT_WORKSPACE_BYTES = 8 * 2**20
"""What FlashInfer plans into; the size that its wrappers allocate themselves."""


@dataclass(frozen=True)
class GpuBuffers:
    """Everything that outlives a forward.

    Attributes:
        caches: selection cache of all layers that select.
        workspace: scratch of decode selection, and of top-k in prefill, within `prefill_limits`.
        rows: scratch of decode selection.
        scratch, means: scratch of prefill selection.
        row_votes: float32, what ranks add up in prefill; empty where a rank chooses alone.
        step: int32, STEP_SECTIONS one after the other, each begun where it is aligned.
        shared: int32, memory of SharedPrefixes for the rows of any batch.
        probe: [max_rows, num_qo_heads * head_dim], decode queries of a layer that is sampled.
        rotated: [max_rows, num_qo_heads, head_dim], decode queries rotated for scoring; empty in absolute mode.
        int_workspace: for the plans of all FlashInfer wrappers of decode, which take turns.
    """

    caches: SelectionCaches
    workspace: DecodeWorkspace
    rows: SelectionRows
    prefill_limits: WorkspaceLimits
    scratch: BlockScratch
    means: torch.Tensor
    row_votes: torch.Tensor
    step: torch.Tensor
    shared: torch.Tensor
    probe: torch.Tensor
    rotated: torch.Tensor
    int_workspace: torch.Tensor

    @classmethod
    def allocate(
        cls,
        config: TokenSelectConfig,
        shape: ModelShape,
        max_rows: int,
        device: torch.device | str,
        *,
        num_ranks: int = 1,
    ) -> GpuBuffers:
        """
        Args:
            max_rows: requests of the largest decode batch.
            num_ranks: ranks that choose together.
        """
        max_budget = max(config.largest_budget, 1)
        heads, head_dim = shape.num_qo_heads, shape.head_dim
        rows_per_block = count_rows_per_block(config.block, config.queries_per_vote)
        num_means = PREFILL_BLOCKS * rows_per_block
        limits = WorkspaceLimits(
            max(max_rows, PREFILL_BLOCKS), max(CANDIDATES, shape.context_len), shape.context_len, max_budget
        )
        own_candidates = max(OWN_CANDIDATES, shape.context_len)
        prefill_limits = replace(limits, max_rows=PREFILL_BLOCKS)
        num_votes = 0
        if num_ranks > 1:
            held = max(ROW_VOTES_BYTES // (4 * rows_per_block), shape.context_len)
            prefill_limits = replace(prefill_limits, max_candidates=min(held, limits.max_candidates))
            if config.combine == "max" and rows_per_block > 1:
                num_votes = prefill_limits.num_tiles * TILE * rows_per_block
        return cls(
            caches=SelectionCaches.create(
                shape.num_layers, config.cache_requests, heads * head_dim, max_budget, shape.dtype, device
            ),
            workspace=DecodeWorkspace(limits, heads, shape.num_kv_heads, device, max_own_candidates=own_candidates),
            rows=SelectionRows.empty(max_rows, device),
            prefill_limits=prefill_limits,
            scratch=BlockScratch.allocate(num_means, heads, device),
            means=torch.empty(num_means, heads, head_dim, dtype=shape.dtype, device=device),
            row_votes=torch.empty(num_votes, dtype=torch.float32, device=device),
            step=torch.zeros(STEP_SECTIONS * (max_rows + ALIGNMENT), dtype=torch.int32, device=device),
            shared=torch.zeros(SharedPrefixes.count_ints(max_rows), dtype=torch.int32, device=device),
            probe=torch.empty(max_rows, heads * head_dim, dtype=shape.dtype, device=device),
            rotated=torch.empty(
                max_rows if config.is_compact else 0, heads, head_dim, dtype=shape.dtype, device=device
            ),
            int_workspace=torch.empty(INT_WORKSPACE_BYTES, dtype=torch.uint8, device=device),
        )

    @property
    def cache_bytes(self) -> int:
        return nbytes(self.caches)

    @property
    def total_bytes(self) -> int:
        return nbytes(self)


def graph_index_slots(config: TokenSelectConfig, max_rows: int, max_context_len: int) -> int:
    """Slots that the requests of one CUDA graph attend to, and one for each row that pads it."""
    return max_rows * (min(config.window.dense_len, max_context_len) + 1)


def reserved_bytes(
    config: TokenSelectConfig, model_config: ModelConfig, kv_cache_dtype: torch.dtype, server_args: Any
) -> int:
    """Bytes of the buffers and of the graphs' slots, before the model and its pools exist; at least those."""
    tp_size = server_args.tp_size
    shape = ModelShape.of(model_config, kv_cache_dtype, model_config.num_hidden_layers, tp_size)
    max_rows = server_args.max_running_requests or MOST_RUNNING_REQUESTS
    graph_rows = server_args.cuda_graph_config.decode.max_bs or 0
    num_slots = graph_index_slots(config, graph_rows, shape.context_len)
    if not config.is_compact:  # what GpuRunner.reserve_graph_rows adds for SGLang's backend
        always_dense = config.dense_layers or getattr(model_config, "sliding_window_size", None)
        num_slots += 2 * graph_rows * (shape.context_len + 1) if always_dense else num_slots
    num_ranks = config.voting_ranks(tp_size)
    buffers = GpuBuffers.allocate(config, shape, max_rows, "meta", num_ranks=num_ranks)
    exchange_bytes = 8 * ExchangeLayout.of(num_ranks, buffers.workspace.limits).num_words if num_ranks > 1 else 0
    return buffers.total_bytes + exchange_bytes + 4 * num_slots
