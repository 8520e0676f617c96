# SPDX-License-Identifier: Apache-2.0
"""Memory of a server's processes and of its GPUs, and the selection cache's holders, sampled while it works."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil

from sglang_tokenselect.server_process import ServerProcess

MB = 1e6
EVERY = 5.0  # seconds


@dataclass(frozen=True)
class Sample:
    """One moment.

    Attributes:
        time: of time.monotonic.
        rss: bytes of each process, by name.
        gpu: bytes in use on all GPUs of the machine; 0 without one.
        lent_entries: of the selection cache.
    """

    time: float
    rss: dict[str, int]
    gpu: int
    lent_entries: int


class Sampler:
    """Samples from a thread of its own while the context lasts."""

    def __init__(self, server: ServerProcess, has_gpu: bool) -> None:
        self._server, self._has_gpu = server, has_gpu
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.samples: list[Sample] = []

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(EVERY):
            try:
                lent = self._server.report()["lent_entries"]
            except OSError:  # the server is gone: whoever asks it tells
                return
            gpu = gpu_bytes() if self._has_gpu else 0
            self.samples.append(Sample(time.monotonic(), rss_of(self._server.pid), gpu, lent))


def rss_of(pid: int) -> dict[str, int]:
    """Of the process and of those that it started, SGLang's by the names that it gives them."""
    process, sizes = psutil.Process(pid), {}
    for one in (process, *process.children(recursive=True)):
        try:
            name = "http" if one.pid == pid else Path(one.cmdline()[0].split()[0]).name.removeprefix("sglang::")
            sizes[name if name not in sizes else f"{name}-{one.pid}"] = one.memory_info().rss
        except (psutil.NoSuchProcess, IndexError):  # ended meanwhile
            continue
    return sizes


def gpu_bytes() -> int:
    query = ("nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits")
    told = subprocess.run(query, check=True, capture_output=True, text=True).stdout
    return sum(int(line) for line in told.split()) * 2**20


def growth(samples: Sequence[Sample], read: Callable[[Sample], float]) -> tuple[float, float]:
    """Median of the first quarter of the samples, and of the last."""
    quarter = max(1, len(samples) // 4)
    first, last = (median(map(read, part)) for part in (samples[:quarter], samples[-quarter:]))
    return first, last


def process_names(samples: Sequence[Sample]) -> list[str]:
    """Those that were there from the first sample to the last."""
    return [name for name in samples[0].rss if all(name in sample.rss for sample in samples)]
