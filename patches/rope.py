# SPDX-License-Identifier: Apache-2.0
"""Compact positions: the model leaves queries and keys un-rotated, the backend rotates them.

Symptom without it: models rotate keys before the backend sees them, so the pool would hold keys
at absolute positions.
Seam: models call `self.rotary_emb(positions, q, k)` right before `self.attn(q, k, v, ...)`, with one
rotary module shared by all layers. It is replaced on each attention module, never changed itself.
Not a hook: it needs the loaded model, so the backend calls it when it is built.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from sglang_tokenselect.kernels.reference.positions import Rope
from sglang_tokenselect.model_shape import attention_layers
from sglang_tokenselect.refusals import Refusal

# Attention modules' switches for kernels that rotate keys and write them to the pool themselves.
_FUSED_PATHS = ("compatible_with_fused_kv_buffer", "use_fused_qk_norm_rope")


class UnrotatedEmbedding(nn.Module):
    """Stands in for a rotary module and returns its inputs."""

    def forward(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor, fused_set_kv_buffer_arg: None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if fused_set_kv_buffer_arg is not None:
            raise RuntimeError("tokenselect: rotary_emb: expected the backend to write the keys, got a fused write")
        return query, key


def take_over_rope(model: nn.Module) -> dict[int, Rope]:
    """Replaces every rotary module next to a RadixAttention; returns the table of each layer_id.

    Raises:
        Refusal: a layer without rotary module, or with a RoPE that is not plain.
    """
    from sglang.srt.layers.radix_attention import RadixAttention

    layer_ids = {layer.layer_id for layer in attention_layers(model)}
    parents = {
        module.attn.layer_id: module
        for module in model.modules()
        if isinstance(getattr(module, "attn", None), RadixAttention) and hasattr(module, "rotary_emb")
    }
    if layer_ids != set(parents):
        raise Refusal(
            "positions=compact", "a rotary embedding in every attention layer", f"none in {layer_ids - set(parents)}"
        )
    ropes = {layer_id: _plain_rope(parent.rotary_emb) for layer_id, parent in parents.items()}
    for parent in parents.values():
        parent.rotary_emb = UnrotatedEmbedding()
        for fused in _FUSED_PATHS:
            if hasattr(parent, fused):
                setattr(parent, fused, False)
    return ropes


def common_rope(ropes: dict[int, Rope], head_dim: int) -> Rope:
    """The one table of all layers in float32, as the GPU's kernels read it.

    Raises:
        Refusal: layers differ, or rotate in another way than FlashInfer does.
    """
    rope = next(iter(ropes.values()))
    for other in ropes.values():
        if other.theta != rope.theta or other.cos_sin_cache.shape != rope.cos_sin_cache.shape:
            raise Refusal("positions=compact", "one RoPE for all layers", f"bases {rope.theta} and {other.theta}")
    if not rope.is_neox_style or rope.cos_sin_cache.shape[-1] != head_dim:
        got = f"rotary_dim={rope.cos_sin_cache.shape[-1]}, is_neox_style={rope.is_neox_style}"
        raise Refusal("positions=compact", f"a RoPE of all {head_dim} dimensions, in halves", got)
    return dataclasses.replace(rope, cos_sin_cache=rope.cos_sin_cache.float())


def _plain_rope(rotary: nn.Module) -> Rope:
    from sglang.srt.layers.rotary_embedding import RotaryEmbedding

    if type(rotary) is not RotaryEmbedding:
        raise Refusal("positions=compact", "a plain RoPE (no scaling)", type(rotary).__name__)
    if getattr(rotary, "position_start", 0):
        raise Refusal("positions=compact", "a rotary table that begins at position 0", rotary.position_start)
    return Rope(rotary.cos_sin_cache, is_neox_style=rotary.is_neox_style, theta=rotary.base)
