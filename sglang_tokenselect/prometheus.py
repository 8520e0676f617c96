# SPDX-License-Identifier: Apache-2.0
"""Snapshots as Prometheus metrics, at SGLang's own `/metrics`.

SGLang's HTTP process collects what any of its processes wrote to PROMETHEUS_MULTIPROC_DIR. So metrics made in the
scheduler's process appear there, once that variable is set: by `--enable-metrics`, before the process starts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from sglang_tokenselect.policies import POLICIES

if TYPE_CHECKING:
    from sglang_tokenselect.snapshot import Snapshot


class Metric(NamedTuple):
    """A metric `tokenselect_{name}`, which shows `source`: a field of Snapshot or a name in its counters.

    Sums since the server started are Prometheus counters, whose names end in `_total`; all others are gauges.
    """

    name: str
    source: str
    help: str

    @property
    def full_name(self) -> str:
        return PREFIX + self.name

    @property
    def is_counter(self) -> bool:
        return self.name.endswith("_total")


PREFIX = "tokenselect_"
POLICY = Metric("policy", "policy", "1 for the policy that sets the effort level, 0 for the others")
METRICS = (
    Metric("effort_level", "level", "0 as configured, above it cheaper, below it with a larger budget"),
    Metric("budget_tokens", "budget", "tokens that a decode query chooses by vote"),
    Metric("theta", "theta", "cosine similarity from which on a selection is reused"),
    Metric("max_reuse", "max_reuse", "decode steps that one selection may serve"),
    Metric("attended_share", "attended_share", "attended of the cached tokens, over the last second"),
    Metric("cache_hit_ratio", "hit_ratio", "reuses of the decode queries that selected, over the last second"),
    Metric("attention_mass", "mass", "share of the candidates' attention that the chosen tokens hold"),
    Metric("itl_milliseconds", "itl_ms", "median time between tokens lately"),
    Metric("itl_target_milliseconds", "itl_target_ms", "time between tokens that policy slo holds"),
    Metric("level_changes_total", "level_changes", "changes of the effort level"),
    Metric("votes_total", "votes", "refreshes: selections made for decode queries, once per layer"),
    Metric("reuses_total", "reuses", "decode queries that an earlier selection served, once per layer"),
    Metric("decode_queries_total", "decode_queries", "decode steps, summed over requests"),
    Metric("dense_queries_total", "dense_queries", "decode queries that attended to everything"),
    Metric(
        "uncached_queries_total", "uncached_queries", "decode queries that the selection cache had no entry left for"
    ),
    Metric("shared_queries_total", "shared_queries", "decode queries that shared the scoring of a prefix with others"),
    Metric("block_votes_total", "block_votes", "selections made for prefill blocks"),
    Metric("cached_tokens_total", "cached_tokens", "tokens that decode queries could have attended to"),
    Metric("attended_tokens_total", "attended_tokens", "tokens that decode queries attended to"),
    Metric("tokens_not_read_total", "tokens_not_read", "cached tokens that decode queries did not attend to"),
)


class PrometheusExporter:
    """Sets the metrics to what a snapshot says. Not thread-safe.

    Args:
        labels: names and values, on every metric.
    """

    def __init__(self, labels: Mapping[str, object]) -> None:
        # prometheus_client looks for PROMETHEUS_MULTIPROC_DIR when it is imported, and never again.
        import prometheus_client

        # A registry of its own: what is served comes from files, and the names are free for a second exporter.
        registry = prometheus_client.CollectorRegistry()

        def create(metric: Metric, *more_labels: str) -> Any:
            names = [*labels, *more_labels]
            if metric.is_counter:
                return prometheus_client.Counter(metric.full_name, metric.help, names, registry=registry)
            return prometheus_client.Gauge(
                metric.full_name, metric.help, names, registry=registry, multiprocess_mode="mostrecent"
            )

        policy = create(POLICY, "policy")
        self._policies = {name: policy.labels(**labels, policy=name) for name in POLICIES}
        self._metrics = [(metric, create(metric).labels(**labels)) for metric in METRICS]
        self._exported: dict[str, float] = {}

    def update(self, snapshot: Snapshot) -> None:
        """A gauge whose value is not known stays away; once it was shown, it becomes NaN, Prometheus's `no value`."""
        values = {**snapshot.to_dict(), **snapshot.counters}
        for policy, child in self._policies.items():
            child.set(policy == snapshot.policy)
        for metric, child in self._metrics:
            value, last = values[metric.source], self._exported.get(metric.name)
            if metric.is_counter:
                child.inc(value - (last or 0))
            elif value is not None:
                child.set(value)
            elif last is not None:
                child.set(math.nan)
            self._exported[metric.name] = value
