# SPDX-License-Identifier: Apache-2.0
"""SGLang's side of the backend: its life cycle, each step a short call into the files beside it.

SGLang calls `__init__` once the weights and the KV pool exist, `init_forward_metadata*` before the
layers of each forward, and `forward_decode` or `forward_extend` in each layer.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from sglang_tokenselect import flags, refusals
from sglang_tokenselect.create_runner import create_runner
from sglang_tokenselect.kernels.reference.window import Window
from sglang_tokenselect.kernels.shared_segment import SharedSegment
from sglang_tokenselect.patches import chunk_alignment, decode_graphs, install, kv_scales
from sglang_tokenselect.planner import StagedRequests, plan_forward
from sglang_tokenselect.prefix_groups import PrefixGroups
from sglang_tokenselect.request_options import parse_options
from sglang_tokenselect.runner import Graph, LayerInput, Runner, Step

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

    from sglang_tokenselect.recording.recorder import Recorder

logger = logging.getLogger(__name__)

_WINDOW = "_tokenselect_window"
"""Attribute of SGLang's Req."""


class TokenSelectAttnBackend(AttentionBackend):
    """Attention over sink, selected and local tokens of each request.

    Raises at construction whatever it cannot serve (refusals.Refusal) and hooks that SGLang did not
    apply (RuntimeError), so that a server never runs half of it.
    """

    def __init__(self, model_runner: ModelRunner) -> None:
        super().__init__()
        install.verify()
        self.config = flags.attached(model_runner.server_args)
        refusals.check_server_args(model_runner.server_args, self.config)
        refusals.check_model(model_runner.model_config, self.config)
        chunk_alignment.align_chunks_to(self.config.block)
        if self.config.window.dense_len >= model_runner.model_config.context_len:
            logger.warning(
                "TokenSelect: requests of up to %d tokens are dense, so none selects", self.config.window.dense_len
            )
        # Models' fused kernels read the pools from the backend by these names.
        self.token_to_kv_pool = model_runner.token_to_kv_pool
        self.req_to_token_pool = model_runner.req_to_token_pool
        self._max_context_len = model_runner.model_config.context_len
        self.runner: Runner = create_runner(model_runner, self.config)
        self._staged: StagedRequests | None = None
        self._windows: Sequence[Window | None] = ()
        self._min_group = 0 if model_runner.server_args.disable_radix_cache else self.runner.min_group
        self._prefix_groups = PrefixGroups(self._min_group, self.config.min_shared)
        self._shared: tuple[SharedSegment, ...] = ()
        self._recorder: Recorder | None = None
        if self.config.record is not None:
            from sglang_tokenselect.recording.recorder import Recorder

            self._recorder = Recorder.of_model(model_runner, self.config, self.runner)
        logger.info("TokenSelect: %s; runner: %s", self.config, type(self.runner).__name__)

    def report(self) -> dict[str, Any]:
        """Configuration as started, effort in force, counters, and who holds selections, for `/server_info`."""
        return {
            "config": self.config.to_options(),
            "effort": asdict(self.runner.effort),
            "counters": self.runner.report().to_dict(),
            "lent_entries": self.runner.lent_entries,
        }

    def stage_requests(self, rows: list[int], reqs: Sequence[Any], tree_cache: Any, *, is_decode: bool = True) -> None:
        """Told by patches/forward_requests.py before each forward, without padding.

        Args:
            rows: `req_pool_indices` on the host.
            reqs: SGLang's Req of each row.
            tree_cache: SGLang's cache of prefixes.
        """
        windows = [self._own_window(req) if req.sampling_params.custom_params else None for req in reqs]
        # Kept until the next forward: SGLang asks for a graph's variant before `_begin`, and once more after it.
        self._windows = windows if any(windows) else ()
        self._shared = self._prefix_groups.find(reqs, tree_cache)
        prompt_lens = () if is_decode else [len(req.origin_input_ids) if req.output_ids else None for req in reqs]
        self._staged = StagedRequests(rows, self._windows, self._shared, prompt_lens)

    def _own_window(self, req: Any) -> Window | None:
        """What the request asks for, read once in its life."""
        if not hasattr(req, _WINDOW):
            setattr(req, _WINDOW, self._parse_window(req))
        return getattr(req, _WINDOW)

    def _parse_window(self, req: Any) -> Window | None:
        """Follows what patches/request_options.py has passed; front ends that do not run it keep no keys apart."""
        try:
            options = parse_options(req.sampling_params.custom_params, self.config.largest_budget)
            if options is None:
                return None
            if not (req.extra_key or "").endswith(options.cache_salt):
                raise ValueError("they did not come through SGLang's own HTTP server or Engine")
        except ValueError as error:
            logger.warning("TokenSelect: options of request %s are not followed: %s", req.rid, error)
            return None
        return options.window(self.config)

    @property
    def selects(self) -> bool:
        """Whether the current forward may read `req_to_token` in its layers."""
        return self.runner.selects

    def decode_step(self, seq_lens: Sequence[int]) -> Step:
        """Which of its graphs a decode step of requests of such lengths needs."""
        return self.runner.decode_step(seq_lens, self._windows, self._shared)

    def may_share(self, num_requests: int) -> bool:
        """Whether a decode step of so many requests may need a graph for steps that share."""
        return 0 < self._min_group <= num_requests

    def fits_graph(self, seq_lens: Sequence[int]) -> bool:
        """Whether a captured graph can serve such a decode step."""
        return self.runner.fits_graph(seq_lens, self._windows, self._shared)

    def init_forward_metadata(self, forward_batch: ForwardBatch) -> None:
        self._begin(forward_batch, Graph.NONE)

    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False) -> None:
        self._begin(forward_batch, Graph.CAPTURE if in_capture else Graph.REPLAY)

    def _begin(self, forward_batch: ForwardBatch, graph: Graph) -> None:
        staged, self._staged = self._staged, None
        if staged is None:
            self._windows, self._shared = (), ()
        if not forward_batch.forward_mode.is_idle():
            step = decode_graphs.captured_step() if graph is Graph.CAPTURE else None
            plan = plan_forward(forward_batch, staged)
            self.runner.begin(plan, forward_batch, graph, step=step)
            if self._recorder is not None:
                self._recorder.begin(plan)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        self.runner.reserve_graph_rows(max_bs, self._max_context_len)

    def get_cuda_graph_seq_len_fill_value(self) -> int:
        return 1

    def forward_decode(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        layer: RadixAttention,
        forward_batch: ForwardBatch,
        save_kv_cache: bool = True,
    ) -> torch.Tensor:
        """Writes k and v of the new tokens, then attends. Both may hold anything afterwards: scales divide in place.

        Args:
            q: [num_tokens, num_qo_heads * head_dim].
            k: [num_tokens, num_kv_heads, head_dim] or flat; un-rotated in compact mode.
            v: as `k`.

        Returns:
            [num_tokens, num_qo_heads * head_dim].
        """
        if self.runner.delegates(layer.layer_id):
            out = self.runner.dense.forward(q, k, v, layer, forward_batch, save_kv_cache)
        else:
            if save_kv_cache:
                where, scales = KVWriteLoc(forward_batch.out_cache_loc), kv_scales.write_scales(layer)
                self.token_to_kv_pool.set_kv_buffer(layer, where, k, v, *scales)
            layer_input = LayerInput.of_pool(self.token_to_kv_pool, layer)
            query = q.view(-1, layer.tp_q_head_num, layer.head_dim)
            out = self.runner.run(query, layer_input).flatten(1)
        if self._recorder is not None:
            self._record(self._recorder, q, layer)
        return out

    forward_extend = forward_decode

    def _record(self, recorder: Recorder, q: torch.Tensor, layer: RadixAttention) -> None:
        layer_input = LayerInput.of_pool(self.token_to_kv_pool, layer)
        recorder.record(q.view(-1, layer.tp_q_head_num, layer.head_dim), layer_input)
