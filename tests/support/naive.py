# SPDX-License-Identifier: Apache-2.0
"""The spec once more, token by token in float64 Python loops: what the reference is tested against."""

from __future__ import annotations

import math

import torch


def softmax(logits: list[float]) -> list[float]:
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    total = sum(weights)
    return [w / total for w in weights]


def score(query: torch.Tensor, keys: torch.Tensor, vote_scale: float = 1.0, modulo: bool = False) -> list[float]:
    """query [H, d], keys [n, H_kv, d] to n scores: sum over heads of each head's softmax."""
    num_qo_heads, num_kv_heads = query.shape[0], keys.shape[1]
    group = num_qo_heads // num_kv_heads
    total = [0.0] * keys.shape[0]
    for head in range(num_qo_heads):
        kv_head = head % num_kv_heads if modulo else head // group
        logits = [vote_scale * float(query[head].double() @ key[kv_head].double()) for key in keys]
        total = [t + share for t, share in zip(total, softmax(logits), strict=True)]
    return total


def ranking(scores: list[float], budget: int) -> list[int]:
    """Indices by falling score, lower index first among equals."""
    return sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:budget]


def rotate(x: torch.Tensor, position: int, theta: float) -> torch.Tensor:
    """One [heads, d] row to `position`, halves paired (Llama), in float64."""
    dim = x.shape[-1]
    out = torch.empty(x.shape, dtype=torch.float64)
    for i in range(dim // 2):
        angle = position * theta ** (-2 * i / dim)
        first, second = x[:, i].double(), x[:, i + dim // 2].double()
        out[:, i] = first * math.cos(angle) - second * math.sin(angle)
        out[:, i + dim // 2] = second * math.cos(angle) + first * math.sin(angle)
    return out


def attend(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float, cap: float = 0.0
) -> torch.Tensor:
    """One query [H, d] over keys and values [t, H_kv, d]."""
    group = query.shape[0] // keys.shape[1]
    out = torch.zeros(query.shape, dtype=torch.float64)
    for head in range(query.shape[0]):
        logits = [scaling * float(query[head].double() @ key[head // group].double()) for key in keys]
        if cap:
            logits = [cap * math.tanh(x / cap) for x in logits]
        for share, value in zip(softmax(logits), values, strict=True):
            out[head] += share * value[head // group].double()
    return out
