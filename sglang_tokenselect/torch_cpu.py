# SPDX-License-Identifier: Apache-2.0
"""A platform for machines without an accelerator, so that real SGLang serves small models there.

SGLang's own CPU engine needs kernels that are not in its wheels; this platform runs the engine on
plain PyTorch. It is for demonstrations, tests and development.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from sglang.srt.platforms.cpu import CpuSRTPlatform
from sglang.srt.platforms.device_mixin import PlatformEnum

from sglang_tokenselect.cpu_platform import NAME

if TYPE_CHECKING:
    from sglang.srt.server_args import ServerArgs

# SGLang's own default is meant for a GPU's memory: on a host it would take nearly all there is.
HOST_MEMORY_FRACTION = 0.2


class TorchCpuPlatform(CpuSRTPlatform):
    """The engine on plain PyTorch: MHA KV pool, page size 1, no graphs."""

    _enum = PlatformEnum.OOT

    def apply_server_args_defaults(self, server_args: ServerArgs) -> None:
        """No graphs, whatever the flags say; a KV pool and threads that leave the host to others too."""
        from sglang.srt.model_executor.cuda_graph_config import Backend, CudaGraphConfig, PhaseConfig

        # Read by the processes that SGLang starts next. OpenMP's threads else spin while they wait, which
        # costs ten times the time where the engine's processes share few cores.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        disabled = PhaseConfig(backend=Backend.DISABLED)
        server_args.disable_cuda_graph = True
        if server_args.mem_fraction_static is None:
            server_args.mem_fraction_static = HOST_MEMORY_FRACTION
        server_args.cuda_graph_config = CudaGraphConfig(decode=disabled, prefill=disabled)

    def get_default_attention_backend(self) -> str:
        return "torch_native"

    def get_compile_backend(self, mode: str | None = None) -> str:
        """What SGLang compiles here, such as the embedding's mask with `--tp 2`, needs no C++ compiler so."""
        return "eager"

    def get_mha_kv_pool_cls(self) -> type:
        """The KV pool of SGLang 0.5.17."""
        from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

        return MHATokenToKVPool

    def get_kv_pool_cls(self, *, kind: str) -> None:
        """The KV pool of newer SGLang: None is the in-tree one."""
        return

    def get_paged_allocator_cls(self) -> type:
        """SGLang 0.5.17 asks for it also at page size 1, the only one that this platform serves."""
        from sglang.srt.mem_cache.allocator import TokenToKVPoolAllocator

        class SingleTokenAllocator(TokenToKVPoolAllocator):
            def __init__(self, size, *args, page_size: int = 1, **kwargs) -> None:
                if page_size != 1:
                    raise ValueError(f"page_size on {NAME}: expected 1, got {page_size}")
                super().__init__(size, *args, **kwargs)

        return SingleTokenAllocator
