# SPDX-License-Identifier: Apache-2.0
"""Small results on their way from the device to the host, for which nobody waits."""

from __future__ import annotations

from collections import deque
from typing import Any

import torch


class DeviceReads:
    """Reads in the order in which they were started."""

    def __init__(self) -> None:
        self._pending: deque[tuple[torch.Tensor, torch.cuda.Event | None]] = deque()

    def start(self, tensor: torch.Tensor) -> None:
        """
        Args:
            tensor: read as it is when the current stream gets here.
        """
        if tensor.device.type != "cuda":
            self._pending.append((tensor.clone(), None))
            return
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        host.copy_(tensor, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._pending.append((host, event))

    def finished(self) -> list[Any]:
        """Values (nested lists) of the reads that have arrived since the last call."""
        arrived = []
        while self._pending and (self._pending[0][1] is None or self._pending[0][1].query()):
            arrived.append(self._pending.popleft()[0].tolist())
        return arrived
