# SPDX-License-Identifier: Apache-2.0
"""Attention for the needle model: dense rows for training, any policy with a KV cache for answers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.needle.model import NeedleLlama
from sglang_tokenselect.config import TokenSelectConfig
from sglang_tokenselect.kernels.reference.positions import Rope
from sglang_tokenselect.kernels.reference.window import Window
from sglang_tokenselect.planner import ForwardPlan, RequestPlan
from sglang_tokenselect.runner import LayerInput
from sglang_tokenselect.torch_runner import TorchRunner


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

    def config(self) -> TokenSelectConfig:
        """The same for the backend's runner: a vote at every step, dense up to the window and no further."""
        window = self.window or Window(num_sink=0, budget=0, num_local=sys.maxsize)
        return TokenSelectConfig(
            sink=window.num_sink,
            budget=window.budget,
            local=window.num_local,
            block=self.block,
            sub_block=self.sub_block,
            positions=self.positions,
            max_reuse=1,
            min_len=0,
        )


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
    """One request with its KV cache, attended to by the backend's runner; positions are slots.

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
        ropes = dict.fromkeys(range(config.num_layers), self.rope) if policy.positions == "compact" else {}
        self.runner = TorchRunner(policy.config(), self.slots.unsqueeze(0), ropes)

    def rewind(self, length: int) -> None:
        """Forgets the tokens from ``length`` on, as a radix cache serves the prefix that remains."""
        self.length = length

    @torch.inference_mode()
    def extend(self, ids: Sequence[int]) -> int:
        """Appends tokens and returns the greedy next one."""
        self.length += len(ids)
        request = RequestPlan(req_pool_idx=0, seq_len=self.length, first_query=0, num_queries=len(ids))
        self.runner.begin(ForwardPlan(is_decode=len(ids) == 1, requests=(request,)))
        hidden = self.model(torch.tensor(ids, device=self.slots.device), self._attend)
        return int(self.model.logits(hidden[-1]).argmax())

    def answer(self, ids: Sequence[int], max_new: int, eos_id: int) -> list[int]:
        """Greedy continuation of the cached prefix and ``ids``."""
        out = [self.extend(ids)]
        while len(out) < max_new and out[-1] != eos_id:
            out.append(self.extend(out[-1:]))
        return out

    def _attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        new = self.slots[self.length - query.shape[0] : self.length]
        if self.policy.positions == "absolute":
            query, key = self.rope.rotate(query, new), self.rope.rotate(key, new)
        self.keys[layer, new], self.values[layer, new] = key, value
        layer_input = LayerInput(layer, self.keys[layer], self.values[layer], scaling=self.scaling, logit_cap=0.0)
        return self.runner.run(query, layer_input)
