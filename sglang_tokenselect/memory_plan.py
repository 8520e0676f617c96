# SPDX-License-Identifier: Apache-2.0
"""What the selection's memory on a GPU is for, and which flags make it smaller.

All of it is told before any of it is allocated, on a machine without a GPU too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from sglang_tokenselect import gpu_buffers
from sglang_tokenselect.config import TokenSelectConfig
from sglang_tokenselect.refusals import Refusal

if TYPE_CHECKING:
    from sglang.srt.configs.model_config import ModelConfig

MB = 10**6


@dataclass(frozen=True)
class Saving:
    """A flag of the server, its value in force, a smaller one, and the bytes that it saves."""

    flag: str
    value: int
    smaller: int
    num_bytes: int

    @property
    def change(self) -> str:
        return f"{self.smaller} instead of {self.value} saves {self.num_bytes / MB:,.0f} MB"


@dataclass(frozen=True)
class MemoryPlan:
    """Of one server: what gpu_buffers.reserved_bytes is told.

    Attributes:
        config: of the selection.
        model_config, kv_cache_dtype, server_args: SGLang's, with CUDA graphs resolved.
    """

    config: TokenSelectConfig
    model_config: ModelConfig
    kv_cache_dtype: torch.dtype
    server_args: Any

    @property
    def num_bytes(self) -> int:
        """Of each GPU, on which SGLang's KV pool leaves room for them."""
        return gpu_buffers.reserved_bytes(self.config, self.model_config, self.kv_cache_dtype, self.server_args)

    @property
    def cache_bytes(self) -> int:
        """Of the selection cache, its share in them."""
        return self.num_bytes - self._with_options(cache_requests=0).num_bytes

    def savings(self) -> list[Saving]:
        """What each flag saves by itself at half of its value, largest first."""
        needed = self.num_bytes
        found = (Saving(flag, value, value // 2, needed - plan.num_bytes) for flag, value, plan in self._halved())
        return sorted((saving for saving in found if saving.num_bytes > 0), key=lambda saving: -saving.num_bytes)

    def _halved(self) -> Iterator[tuple[str, int, MemoryPlan]]:
        """A flag, its value, and the plan with half of it."""
        config, args = self.config, self.server_args
        half = config.cache_requests // 2
        yield "--tokenselect-cache-requests", config.cache_requests, self._with_options(cache_requests=half)
        flag = "--tokenselect-budget" if config.max_budget is None else "--tokenselect-max-budget"
        half = config.largest_budget // 2
        # The options that must not exceed the budget take no memory.
        smaller = self._with_options(budget=half, max_budget=None, min_budget=0)
        yield flag, config.largest_budget, smaller
        rows = args.max_running_requests or gpu_buffers.MOST_RUNNING_REQUESTS
        yield "--max-running-requests", rows, self._with_args(max_running_requests=rows // 2)
        graph_rows = args.cuda_graph_config.decode.max_bs or 0
        yield "--cuda-graph-max-bs-decode", graph_rows, self.with_graph_rows(graph_rows // 2)

    def advice(self) -> str:
        return "; ".join(f"{saving.flag} {saving.change}" for saving in self.savings())

    def with_graph_rows(self, graph_rows: int) -> MemoryPlan:
        """With decode CUDA graphs of up to so many requests."""
        graphs = SimpleNamespace(decode=SimpleNamespace(max_bs=graph_rows))
        return self._with_args(cuda_graph_config=graphs)

    def _with_options(self, **options: Any) -> MemoryPlan:
        return replace(self, config=replace(self.config, **options))

    def _with_args(self, **changes: Any) -> MemoryPlan:
        return replace(self, server_args=_Changed(self.server_args, changes))


class _Changed:
    """ServerArgs with other values: SGLang seals its own once they are resolved."""

    def __init__(self, server_args: Any, changes: dict[str, Any]) -> None:
        self._server_args, self._changes = server_args, changes

    def __getattr__(self, name: str) -> Any:
        return self._changes[name] if name in self._changes else getattr(self._server_args, name)


@contextmanager
def told_if_out_of_memory(what: str, plan: MemoryPlan) -> Iterator[None]:
    """Around an allocation at start: where the GPU's memory ends, the error names the flags that help.

    Args:
        what: is allocated.

    Raises:
        Refusal: instead of torch.OutOfMemoryError.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        got = str(error).partition(" If reserved")[0].strip()
        fraction = plan.server_args.mem_fraction_static
        reason = f"a --mem-fraction-static below {fraction} leaves more beside the KV pool; {plan.advice()}"
        raise Refusal("GPU memory", f"{plan.num_bytes:,} bytes for {what}", repr(got), reason) from error
