# SPDX-License-Identifier: Apache-2.0
"""The GPUs, and how each pair of them can reach the other's memory."""

from __future__ import annotations

from itertools import combinations
from typing import Any

from sglang_tokenselect.doctor.report import Section

GIB = 2**30


def examine() -> Section:
    import torch

    num_gpus = torch.cuda.device_count()
    facts: dict[str, Any] = {"number": num_gpus}
    for index in range(num_gpus):
        found = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        memory = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
        facts[f"cuda:{index}"] = f"{found.name}, compute capability {found.major}.{found.minor}, {memory}"
    for one, other in combinations(range(num_gpus), 2):
        facts[f"cuda:{one} - cuda:{other}"] = _connection(one, other)
    return Section(facts)


def _connection(one: int, other: int) -> str:
    import torch

    reached = torch.cuda.can_device_access_peer(one, other) and torch.cuda.can_device_access_peer(other, one)
    return f"{'P2P' if reached else 'no P2P'}, {_nvlink(one, other)}"


def _nvlink(one: int, other: int) -> str:
    """What the driver says. Its numbers of GPUs are not those of CUDA_VISIBLE_DEVICES, so they are found by UUID."""
    import pynvml
    import torch

    try:
        pynvml.nvmlInit()
        uuids = [f"GPU-{torch.cuda.get_device_properties(index).uuid}" for index in (one, other)]
        handles = [pynvml.nvmlDeviceGetHandleByUUID(uuid) for uuid in uuids]
        status = pynvml.nvmlDeviceGetP2PStatus(*handles, pynvml.NVML_P2P_CAPS_INDEX_NVLINK)
    except pynvml.NVMLError as error:
        return f"NVLink not told ({error})"
    return "NVLink" if status == pynvml.NVML_P2P_STATUS_OK else "no NVLink"
