# SPDX-License-Identifier: Apache-2.0
"""Compact positions: the model leaves queries and keys un-rotated, the backend rotates them.

Symptom without it: models rotate keys before the backend sees them, so the pool would hold keys
at absolute positions.
Seam: models call `self.rotary_emb(positions, q, k)` right before `self.attn(q, k, v, ...)`, with one
rotary module shared by all layers. It is replaced on each attention module, never changed itself.
Not a hook: it needs the loaded model, so the backend calls it when it is built.
"""

from __future__ import annotations

import torch
from torch import nn

from sglang_tokenselect.kernels.reference.positions import Rope
from sglang_tokenselect.refusals import Refusal


class UnrotatedEmbedding(nn.Module):
    """Stands in for a rotary module and returns its inputs."""

    def forward(
        self, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return query, key


def take_over_rope(model: nn.Module) -> dict[int, Rope]:
    """Replaces every rotary module next to a RadixAttention; returns the table of each layer_id.

    Raises:
        Refusal: a layer without rotary module, or with a RoPE that is not plain.
    """
    from sglang.srt.layers.radix_attention import RadixAttention

    layer_ids = {module.layer_id for module in model.modules() if isinstance(module, RadixAttention)}
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
    return ropes


def _plain_rope(rotary: nn.Module) -> Rope:
    from sglang.srt.layers.rotary_embedding import RotaryEmbedding

    if type(rotary) is not RotaryEmbedding:
        raise Refusal("positions=compact", "a plain RoPE (no scaling)", type(rotary).__name__)
    if getattr(rotary, "position_start", 0):
        raise Refusal("positions=compact", "a rotary table that begins at position 0", rotary.position_start)
    return Rope(rotary.cos_sin_cache, is_neox_style=rotary.is_neox_style)
