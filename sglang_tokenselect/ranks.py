# SPDX-License-Identifier: Apache-2.0
"""The processes among which SGLang splits a layer's heads, as far as they choose tokens together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from sglang_tokenselect.config import TokenSelectConfig


@dataclass(frozen=True)
class Ranks:
    """
    Attributes:
        rank: this process among them, from 0.
        world_size: processes that choose together; 1: this one has all heads that vote, and asks nobody.
        group: of these processes, gloo or NCCL; None with one.
    """

    rank: int = 0
    world_size: int = 1
    group: dist.ProcessGroup | None = None

    @classmethod
    def of_server(cls, server_args: Any, config: TokenSelectConfig) -> Ranks:
        """The attention group of this process, once SGLang has made it; this process alone with vote=local."""
        if server_args.tp_size == 1 or config.vote == "local":
            return ALONE
        from sglang.srt.distributed.parallel_state import get_attn_tp_group

        group = get_attn_tp_group()
        return cls(group.rank_in_group, group.world_size, group.device_group)

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Adds up what each rank has; afterwards `tensor` is the same on all of them, to the last bit.

        A collective: all ranks call it in the same order with tensors of one shape.

        Args:
            tensor: any shape, contiguous; changed in place.

        Returns:
            `tensor`.
        """
        if self.group is not None:
            dist.all_reduce(tensor, group=self.group)
        return tensor


ALONE = Ranks()
