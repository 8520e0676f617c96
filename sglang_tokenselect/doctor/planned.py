# SPDX-License-Identifier: Apache-2.0
"""The server that the command line plans, as SGLang reads it: its arguments, our configuration, the model's."""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from sglang_tokenselect.config import TokenSelectConfig
from sglang_tokenselect.memory_plan import MemoryPlan
from sglang_tokenselect.model_shape import ModelShape
from sglang_tokenselect.plugin import BACKEND

if TYPE_CHECKING:
    from sglang.srt.configs.model_config import ModelConfig

_KV_DTYPES = {"bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "fp8_e4m3": torch.float8_e4m3fn}


@dataclass(frozen=True)
class PlannedServer:
    """
    Attributes:
        server_args: not checked; see `resolve`.
        options_given: TokenSelect options were given.
    """

    server_args: Any
    config: TokenSelectConfig
    options_given: bool

    @classmethod
    def read(cls, model_path: str | None, server_flags: Sequence[str]) -> PlannedServer:
        """
        Raises:
            ValueError: flags that SGLang's parser, or SGLang, or TokenSelectConfig refuses.
        """
        from sglang.srt.server_args import ServerArgs

        from sglang_tokenselect.patches import server_args

        parser = _Parser(prog="sglang.launch_server", allow_abbrev=True)
        ServerArgs.add_cli_args(parser)
        given = ["--model-path", model_path] if model_path is not None else []
        namespace = parser.parse_args(["--attention-backend", BACKEND, *given, *server_flags])
        if getattr(namespace, "config", None) is not None:
            raise ValueError(f"--config: expected the flags that it holds, got {namespace.config}")
        # SGLang's own method, without our hook around it: that ends the process over the first refusal.
        original = inspect.unwrap(ServerArgs.from_cli_args.__func__)
        return cls(*server_args.read_flags(original, ServerArgs, namespace))

    def resolve(self) -> None:
        """Has SGLang fill in what was not given: 0.5.17 did so when it read the flags."""
        if hasattr(self.server_args, "resolve_once"):
            self.server_args.resolve_once()

    def model_config(self) -> ModelConfig:
        from sglang.srt.configs.model_config import ModelConfig

        return ModelConfig.from_server_args(self.server_args)

    @property
    def has_kernels(self) -> bool:
        """Whether it selects by the kernels for GPUs."""
        return self.server_args.device == "cuda" and self.config.selects_by.has_kernels

    def kv_dtype(self, model_config: ModelConfig) -> torch.dtype:
        """Of what "auto" is before the weights are read; a checkpoint may say otherwise in them."""
        return _KV_DTYPES.get(self.server_args.kv_cache_dtype, model_config.dtype)

    def shape(self, model_config: ModelConfig) -> ModelShape:
        """Of the layers that select, in one process."""
        num_layers = model_config.num_hidden_layers - len(set(self.config.dense_layers))
        return ModelShape.of(model_config, self.kv_dtype(model_config), num_layers, self.server_args.tp_size)

    def memory_plan(self, model_config: ModelConfig) -> MemoryPlan:
        plan = MemoryPlan(self.config, model_config, self.kv_dtype(model_config), self.server_args)
        # Where there is no GPU, our platform keeps SGLang from following this flag.
        given = self.server_args.cuda_graph_max_bs_decode
        return plan if given is None else plan.with_graph_rows(given)


class _Parser(argparse.ArgumentParser):
    """Its errors are sections of the report, not the end of the process."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)
