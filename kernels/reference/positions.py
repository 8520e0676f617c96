# SPDX-License-Identifier: Apache-2.0
"""Rotary embedding at positions of our choice, from the table that the model itself uses."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Rope:
    """Plain RoPE.

    Attributes:
        cos_sin_cache: [max_position, rotary_dim], cosines then sines.
        is_neox_style: halves are paired (Llama); otherwise neighbours are.
        theta: base of the frequencies, for kernels that compute the table themselves.
    """

    cos_sin_cache: torch.Tensor
    is_neox_style: bool = True
    theta: float | None = None

    @classmethod
    def from_theta(cls, theta: float, head_dim: int, max_position: int, *, dtype: torch.dtype = torch.float32) -> Rope:
        """The table of a plain RoPE with base ``theta``, computed in float64."""
        inv_freq = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
        angle = torch.arange(max_position, dtype=torch.float64)[:, None] * inv_freq
        return cls(torch.cat([angle.cos(), angle.sin()], dim=-1).to(dtype), theta=theta)

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rotates row i of ``x`` to ``positions[i]``, in float32 at least; dimensions past rotary_dim pass through.

        Args:
            x: [num_tokens, num_heads, head_dim].
            positions: [num_tokens] integer, or [1] for one position of all rows.

        Returns:
            [num_tokens, num_heads, head_dim] in the dtype of ``x``, rounded once.
        """
        rotary_dim = self.cos_sin_cache.shape[-1]
        dtype = torch.promote_types(x.dtype, torch.float32)
        cos, sin = self.cos_sin_cache[positions].to(dtype).unsqueeze(1).chunk(2, dim=-1)
        turned, passed = x[..., :rotary_dim].to(dtype), x[..., rotary_dim:]
        if self.is_neox_style:
            first, second = turned.chunk(2, dim=-1)
            turned = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
        else:
            first, second = turned[..., ::2], turned[..., 1::2]
            turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)
        turned = turned.to(x.dtype)
        return torch.cat([turned, passed], dim=-1) if passed.shape[-1] else turned
