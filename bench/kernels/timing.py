# SPDX-License-Identifier: Apache-2.0
"""Device time of kernels: cold L2, median and spread, and the machine that it was measured on."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from bench.result_file import commit, spread

Step = Callable[[], object]

FLUSH_BYTES = 256 * 2**20  # several times any L2
HOST_LEAD_CYCLES = 500_000  # a quarter of a millisecond


@dataclass(frozen=True)
class Timing:
    """Microseconds: the median of the repeats and the percentiles around it."""

    median_us: float
    p20_us: float
    p80_us: float

    @classmethod
    def of(cls, microseconds: Sequence[float]) -> Timing:
        return cls(*spread(microseconds))


def time_layers(steps: Sequence[Step], *, replays: int = 20, flush: bool = True, before: Step | None = None) -> Timing:
    """Time per step of a CUDA graph of all steps, as a decode step runs its layers.

    Each step needs tensors of its own: with shared ones, all but the first would find them in L2. The few
    microseconds by which the device starts a graph are spread over the steps, so give several.

    Args:
        steps: capturable calls; what they return is dropped.
        flush: empty L2 before each replay, outside of the timed region.
        before: launched right before each replay, outside of the timed region too.
    """
    _warm_up(steps)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for step in steps:
            step()
    _warm_up([graph.replay])
    return Timing.of([time / len(steps) for time in _measure(graph.replay, replays, flush, before)])


def time_eager(step: Step, *, repeats: int = 20, flush: bool = True) -> Timing:
    """Time of one call that cannot be captured. Launch gaps count where the host falls behind the device."""
    _warm_up([step])
    return Timing.of(_measure(step, repeats, flush))


def copy_bandwidth(num_bytes: int = 4 * 10**9) -> float:
    """TB/s of a device-to-device copy of ``num_bytes``, bytes read and bytes written both counted."""
    source = torch.rand(num_bytes // 4, device="cuda")
    target = torch.empty_like(source)
    microseconds = time_eager(lambda: target.copy_(source)).median_us
    return 2 * num_bytes / microseconds * 1e6 / 1e12


def machine() -> dict[str, str]:
    """What the numbers depend on."""
    return {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "triton": _version("triton"),
        "flashinfer": _version("flashinfer"),
        "sgl_kernel": _version("sgl_kernel"),
        "commit": commit(),
    }


def _warm_up(steps: Iterable[Step]) -> None:
    # Twice: the first call compiles and allocates workspaces, neither of which a graph may do.
    for _ in range(2):
        for step in steps:
            step()
    torch.cuda.synchronize()


def _measure(launch: Step, repeats: int, flush: bool, before: Step | None = None) -> list[float]:
    """Microseconds of each launch."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        if flush:
            _flush_l2()
        # The device waits here while the host queues the launch, so that no host time is measured.
        torch.cuda._sleep(HOST_LEAD_CYCLES)
        if before is not None:
            before()
        start.record()
        launch()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in events]


def _flush_l2() -> None:
    # The read leaves clean lines: written ones would go back to memory within the timed region.
    _flush_buffer().fill_(1.0).sum()


@functools.cache
def _flush_buffer() -> torch.Tensor:
    return torch.empty(FLUSH_BYTES // 4, device="cuda")


def _version(module: str) -> str:
    try:
        return str(importlib.import_module(module).__version__)
    except ImportError:
        return "missing"
