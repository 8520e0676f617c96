# SPDX-License-Identifier: Apache-2.0
"""The sizes of a model's attention that the GPU runner needs, from SGLang's configuration and the loaded model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sglang_tokenselect.refusals import Refusal

if TYPE_CHECKING:
    from sglang.srt.configs.model_config import ModelConfig


@dataclass(frozen=True)
class ModelShape:
    """Attention of one model, as one process runs it.

    Attributes:
        num_layers, head_dim: of the model.
        num_qo_heads, num_kv_heads: of this process, one rank of a tensor parallel group.
        dtype: of the model, so of queries.
        kv_dtype: of cached keys and values.
        context_len: tokens of the longest request.
    """

    num_layers: int
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    kv_dtype: torch.dtype
    context_len: int

    @classmethod
    def of(cls, model_config: ModelConfig, kv_dtype: torch.dtype, num_layers: int, tp_size: int = 1) -> ModelShape:
        return cls(
            num_layers=num_layers,
            num_qo_heads=model_config.get_num_attention_heads(tp_size),
            num_kv_heads=model_config.get_num_kv_heads(tp_size),
            head_dim=model_config.head_dim,
            dtype=model_config.dtype,
            kv_dtype=kv_dtype,
            context_len=model_config.context_len,
        )


def attention_layers(model: nn.Module) -> list[Any]:
    """The model's RadixAttention modules.

    Raises:
        Refusal: it shows none, as with `--model-impl transformers`.
    """
    from sglang.srt.layers.radix_attention import RadixAttention

    layers = [module for module in model.modules() if isinstance(module, RadixAttention)]
    if not layers:
        raise Refusal("model", "attention layers among its modules, as SGLang's own models have", "none")
    return layers


def sliding_layers(layers: Sequence[Any]) -> frozenset[int]:
    """layer_id of the layers with a sliding window, which attend to all of it."""
    return frozenset(layer.layer_id for layer in layers if layer.sliding_window_size > -1)


def common_logit_cap(layers: Sequence[Any]) -> float:
    """The tanh soft cap of the logits that all layers share; 0 for none.

    Raises:
        Refusal: layers differ, or cap in another way.
    """
    caps = {layer.logit_cap or 0.0 for layer in layers}
    if len(caps) > 1:
        raise Refusal("model", "one logit cap for all layers", sorted(caps))
    methods = {layer.logit_capping_method for layer in layers if layer.logit_cap}
    if methods - {"tanh"}:
        raise Refusal("model", "logits capped by tanh", sorted(methods))
    return caps.pop() if caps else 0.0
