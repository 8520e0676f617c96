# SPDX-License-Identifier: Apache-2.0
"""SGLang's side of the backend: its life cycle, each step a short call into the files beside it.

SGLang calls `__init__` once the weights and the KV pool exist, `init_forward_metadata*` before the
layers of each forward, and `forward_decode` or `forward_extend` in each layer.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from sglang.srt.layers.attention.base_attn_backend import AttentionBackend

from sglang_tokenselect import flags, refusals
from sglang_tokenselect.patches import chunk_alignment, install, rope
from sglang_tokenselect.planner import ForwardPlan, plan_forward
from sglang_tokenselect.torch_runner import LayerInput, TorchRunner

if TYPE_CHECKING:
    from sglang.srt.layers.radix_attention import RadixAttention
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch
    from sglang.srt.model_executor.model_runner import ModelRunner

logger = logging.getLogger(__name__)


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
        self._token_to_kv_pool = model_runner.token_to_kv_pool
        ropes = rope.take_over_rope(model_runner.model) if self.config.is_compact else {}
        self._runner = TorchRunner(self.config, model_runner.req_to_token_pool.req_to_token, ropes)
        self._plan = ForwardPlan(is_decode=True, requests=())
        logger.info("TokenSelect: %s; runner: plain PyTorch on the CPU", self.config)

    def report(self) -> dict[str, Any]:
        """Configuration and counters, for `/server_info`."""
        return {"config": self.config.to_options(), "counters": self._runner.counters.to_dict()}

    def init_forward_metadata_out_graph(self, forward_batch: ForwardBatch, in_capture: bool = False) -> None:
        if forward_batch.forward_mode.is_idle():
            return
        self._plan = plan_forward(forward_batch)
        self._runner.begin(self._plan)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        """Nothing is captured on a CPU; SGLang's harness calls it all the same."""

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
        """Writes k and v of the new tokens, then attends.

        Args:
            q: [num_tokens, num_qo_heads * head_dim].
            k: [num_tokens, num_kv_heads, head_dim] or flat; un-rotated in compact mode.
            v: as `k`.

        Returns:
            [num_tokens, num_qo_heads * head_dim].
        """
        if save_kv_cache:
            self._token_to_kv_pool.set_kv_buffer(layer, forward_batch.out_cache_loc, k, v)
        layer_input = LayerInput(
            layer_id=layer.layer_id,
            key_pool=self._token_to_kv_pool.get_key_buffer(layer.layer_id),
            value_pool=self._token_to_kv_pool.get_value_buffer(layer.layer_id),
            scaling=layer.scaling,
            logit_cap=layer.logit_cap,
        )
        query = q.view(-1, layer.tp_q_head_num, layer.head_dim)
        return self._runner.run(query, layer_input, self._plan).flatten(1)

    forward_extend = forward_decode
