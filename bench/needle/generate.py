# SPDX-License-Identifier: Apache-2.0
"""Attention for the needle model: dense rows for training, any policy with a KV cache for answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.needle.model import NeedleLlama
from sglang_tokenselect.kernels.reference.attention import attend_positions
from sglang_tokenselect.kernels.reference.decode import select_for_query
from sglang_tokenselect.kernels.reference.kv import RequestKV
from sglang_tokenselect.kernels.reference.positions import Rope
from sglang_tokenselect.kernels.reference.prefill import cut_blocks, first_sparse_position, select_for_block
from sglang_tokenselect.kernels.reference.window import Window


@dataclass(frozen=True)
class Policy:
    """What a query attends to: everything if ``window`` is None, else sink + voted + local."""

    name: str
    window: Window | None = None
    positions: Literal["absolute", "compact"] = "absolute"
    block: int = 128
    sub_block: int = 16

    def __str__(self) -> str:
        if self.window is None:
            return self.name
        w = self.window
        return f"{w.num_sink}+{w.budget}+{w.num_local} block {self.block}/{self.sub_block} {self.positions}"


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[..., heads, head_dim] turned by float32 ``cos`` and ``sin`` [..., 1, head_dim / 2]; halves are paired."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def rope_tables(theta: float, head_dim: int, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [len(positions), 1, head_dim / 2] in float32."""
    rope = Rope.from_theta(theta, head_dim, int(positions.max()) + 1)
    cos, sin = rope.cos_sin_cache.to(positions.device)[positions].unsqueeze(1).chunk(2, dim=-1)
    return cos, sin


class CausalRows:
    """Dense causal attention of equally long rows, at absolute positions."""

    def __init__(self, rows: int, length: int, cos: Tensor, sin: Tensor, turn=rotate) -> None:
        self.shape, self.cos, self.sin, self.turn = (rows, length), cos, sin, turn

    def __call__(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        group = query.shape[1] // key.shape[1]
        query, key = self.turn(query, self.cos, self.sin), self.turn(key, self.cos, self.sin)
        key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
        # [rows * length, heads, d] -> [rows, heads, length, d]
        by_row = (x.unflatten(0, self.shape).transpose(1, 2) for x in (query, key, value))
        out = F.scaled_dot_product_attention(*by_row, is_causal=True)
        return out.transpose(1, 2).flatten(0, 1)


class Request:
    """One request with its KV cache; positions are slots.

    In compact mode the cache holds un-rotated keys, else rotated ones.
    """

    def __init__(self, model: NeedleLlama, policy: Policy, capacity: int) -> None:
        config, weight = model.config, model.model.norm.weight
        self.model, self.policy, self.length = model, policy, 0
        shape = (config.num_layers, capacity, config.num_kv_heads, config.head_dim)
        self.keys, self.values = weight.new_empty(shape), weight.new_empty(shape)
        self.slots = torch.arange(capacity, device=weight.device)
        table = Rope.from_theta(config.rope_theta, config.head_dim, capacity).cos_sin_cache
        self.rope = Rope(table.to(weight.device))
        self.scaling = config.head_dim**-0.5

    def rewind(self, length: int) -> None:
        """Forgets the tokens from ``length`` on, as a radix cache serves the prefix that remains."""
        self.length = length

    @torch.inference_mode()
    def extend(self, ids: Sequence[int]) -> int:
        """Appends tokens and returns the greedy next one."""
        self.start, self.length = self.length, self.length + len(ids)
        hidden = self.model(torch.tensor(ids, device=self.slots.device), self._attend)
        return int(self.model.logits(hidden[-1]).argmax())

    def answer(self, ids: Sequence[int], max_new: int, eos_id: int) -> list[int]:
        """Greedy continuation of the cached prefix and ``ids``."""
        out = [self.extend(ids)]
        while len(out) < max_new and out[-1] != eos_id:
            out.append(self.extend(out[-1:]))
        return out

    def _attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        start, end, policy = self.start, self.length, self.policy
        if policy.positions == "absolute":
            places = self.slots[start:end]
            query, key = self.rope.rotate(query, places), self.rope.rotate(key, places)
        self.keys[layer, start:end], self.values[layer, start:end] = key, value
        if policy.window is None or end <= policy.window.size:
            return self._over(layer, query, slice(0, end), end)
        if end - start == 1:
            return self._attend_decode(layer, query, policy.window)
        return self._attend_blocks(layer, query, policy.window)

    def _kv(self, layer: int, end: int) -> RequestKV:
        return RequestKV(self.keys[layer], self.values[layer], self.slots[:end])

    @property
    def _compact_rope(self) -> Rope | None:
        return self.rope if self.policy.positions == "compact" else None

    def _over(self, layer: int, query: Tensor, positions: Tensor | slice, end: int) -> Tensor:
        kv = self._kv(layer, end)
        return attend_positions(query, kv, positions, scaling=self.scaling, rope=self._compact_rope)

    def _attend_decode(self, layer: int, query: Tensor, window: Window) -> Tensor:
        ranked = self.slots[:0]
        if window.budget:
            ranked = select_for_query(query[0], self._kv(layer, self.length), window, rope=self._compact_rope)
        return self._over(layer, query, window.positions(ranked, self.length), self.length)

    def _attend_blocks(self, layer: int, query: Tensor, window: Window) -> Tensor:
        start, end, policy = self.start, self.length, self.policy
        sparse = first_sparse_position(start, end, policy.block, window)
        out = [self._over(layer, query[: sparse - start], slice(0, sparse), sparse)] if sparse > start else []
        candidates = self._kv(layer, end).keys(slice(window.num_sink, end))
        for lo, hi in cut_blocks(sparse, end, policy.block):
            block, ranked = query[lo - start : hi - start], self.slots[:0]
            if window.budget:
                ranked = select_for_block(
                    block, candidates, lo, window, sub_block=policy.sub_block, rope=self._compact_rope
                )
            attended = torch.cat([window.positions(ranked, lo), self.slots[lo:hi]])
            out.append(self._over(layer, block, attended, hi))
        return torch.cat(out)
