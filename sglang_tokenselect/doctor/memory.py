# SPDX-License-Identifier: Apache-2.0
"""Bytes that the selection takes on each GPU beside weights and KV pool, and the flags that make them fewer."""

from __future__ import annotations

from sglang_tokenselect.doctor.planned import PlannedServer
from sglang_tokenselect.doctor.report import Section
from sglang_tokenselect.memory_plan import MB


def examine(planned: PlannedServer) -> Section:
    import torch

    if not planned.has_kernels:
        return Section({"selection": "nothing in advance: PyTorch selects"})
    plan = planned.memory_plan(planned.model_config())
    needed = plan.num_bytes
    graph_rows = plan.server_args.cuda_graph_config.decode.max_bs
    section = Section(
        {
            "selection, on each GPU": f"{needed / MB:,.0f} MB",
            "of it the selection cache": f"{plan.cache_bytes / MB:,.0f} MB",
            "decode CUDA graphs": f"of up to {graph_rows} requests (if not given, SGLang's choice for this machine)",
        }
    )
    section.facts.update({saving.flag: saving.change for saving in plan.savings()})
    if torch.cuda.is_available() and needed > (free := torch.cuda.mem_get_info()[0]):
        section.problems.append(f"GPU memory: expected {needed:,} bytes for the selection, got {free:,} free")
    return section
