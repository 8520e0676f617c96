# SPDX-License-Identifier: Apache-2.0
"""Tells the outside of the scheduler's process about its attention, and lets it change options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sglang_tokenselect.controller import Controller
from sglang_tokenselect.prometheus import PrometheusExporter
from sglang_tokenselect.snapshot import Reading, SnapshotTaker
from sglang_tokenselect.sockets import TelemetryServer


class Telemetry:
    """To wherever it is configured to go: Prometheus, the endpoint that publishes, the one that takes commands.

    All methods belong to one thread, the scheduler's, and never wait for a reader.

    Attributes:
        is_watched: whether anybody is told anything.

    Args:
        labels: of the Prometheus metrics; None for no metrics.

    Raises:
        ConfigError: an endpoint cannot be bound.
    """

    def __init__(self, controller: Controller, labels: Mapping[str, object] | None) -> None:
        config = controller.config
        self._taker = SnapshotTaker(controller)
        self._exporter = None if labels is None else PrometheusExporter(labels)
        self._server = TelemetryServer(controller) if config.publish or config.control else None
        self.is_watched = self._exporter is not None or self._server is not None

    @classmethod
    def start(cls, scheduler: Any, controller: Controller) -> Telemetry:
        """With SGLang's own labels, if it has metrics (--enable-metrics)."""
        collector = scheduler.metrics_collector
        return cls(controller, labels=None if collector is None else collector.labels)

    def send(self, reading: Reading) -> None:
        """Once per period: what is told as a share is about the time since the last one."""
        self._send(reading, is_periodic=True)

    def send_change(self, reading: Reading) -> None:
        """Right after the effort has changed."""
        self._send(reading, is_periodic=False)

    def _send(self, reading: Reading, *, is_periodic: bool) -> None:
        snapshot = self._taker.take(reading, is_periodic=is_periodic)
        if self._exporter is not None:
            self._exporter.update(snapshot)
        if self._server is not None:
            self._server.send(snapshot)
