# SPDX-License-Identifier: Apache-2.0
"""Snapshots, their way to Prometheus, and the dashboard that shows them."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import prometheus_client.multiprocess
import pytest
import zmq
from snapshots import SNAPSHOT

from sglang_tokenselect import telemetry
from sglang_tokenselect.config import ConfigError, TokenSelectConfig
from sglang_tokenselect.controller import Controller, Load
from sglang_tokenselect.counters import Counters
from sglang_tokenselect.prometheus import METRICS, POLICY
from sglang_tokenselect.snapshot import Reading, Snapshot, SnapshotTaker
from sglang_tokenselect.sockets import TelemetryServer, open_client

REPO = Path(__file__).parents[2]
DASHBOARD = (REPO / "docs" / "grafana_dashboard.json").read_text()
LABELS = {"model_name": "m", "tp_rank": 0}


def reading(**counters: int) -> Reading:
    return Reading(running=2, waiting=1, kv_usage=0.5, counters=Counters(**counters).to_dict())


def shares(snapshot: Snapshot) -> tuple[float | None, float | None]:
    return snapshot.attended_share, snapshot.hit_ratio


def test_snapshot_tells_the_controllers_and_the_schedulers_state():
    controller = Controller(TokenSelectConfig(budget=1000, max_budget=4000, level=2, min_mass=0.9))
    controller.note_mass(0.8)
    snapshot = SnapshotTaker(controller).take(reading(cached_tokens=50, attended_tokens=20), is_periodic=True)
    assert (snapshot.policy, snapshot.level, snapshot.budget, snapshot.theta) == ("fixed", 2, 500, 0.6)
    assert (snapshot.highest_level, snapshot.lowest_level) == (-2, 4)
    assert (snapshot.mass, snapshot.min_mass, snapshot.itl_ms, snapshot.itl_target_ms) == (0.8, 0.9, None, None)
    assert (snapshot.running, snapshot.waiting, snapshot.kv_usage) == (2, 1, 0.5)
    message = json.loads(json.dumps(snapshot.to_dict()))
    assert message["tokens_not_read"] == 30
    assert message.keys() == {field.name for field in fields(Snapshot)} | {"tokens_not_read"}


def test_itl_is_in_milliseconds():
    controller = Controller(TokenSelectConfig())
    for _ in range(20):
        controller.observe(Load(num_running=1, oldest_wait=0.0, kv_usage=0.1, gap=0.012))
    assert SnapshotTaker(controller).take(reading(), is_periodic=True).itl_ms == pytest.approx(12.0)


def test_shares_are_about_the_time_since_the_last_periodic_snapshot():
    taker = SnapshotTaker(Controller(TokenSelectConfig()))
    first = reading(cached_tokens=100, attended_tokens=50, votes=3, reuses=1)
    second = reading(cached_tokens=300, attended_tokens=100, votes=4, reuses=10)
    assert shares(taker.take(reading(), is_periodic=True)) == (None, None)
    assert shares(taker.take(first, is_periodic=True)) == (0.5, 0.25)
    assert shares(taker.take(second, is_periodic=False)) == (0.25, 0.9)
    assert shares(taker.take(second, is_periodic=True)) == (0.25, 0.9)
    assert shares(taker.take(second, is_periodic=True)) == (None, None)


def test_level_changes_are_counted():
    controller = Controller(TokenSelectConfig())
    taker = SnapshotTaker(controller)
    counts = []
    for level in (0, 2, 2, 1):
        controller.configure({"level": level})
        controller.rest()
        counts.append(taker.take(reading(), is_periodic=False).level_changes)
    assert counts == [0, 1, 1, 2]


def ask(server: TelemetryServer) -> dict:
    with open_client(zmq.REQ, server.control) as client:
        client.send(b'{"command": "get"}')
        assert client.poll(5000), "no answer came"
        return json.loads(client.recv())["snapshot"]


def test_telemetry_goes_to_prometheus_and_to_the_endpoints(monkeypatch):
    exporter = mock.Mock()
    monkeypatch.setattr(telemetry, "PrometheusExporter", exporter)
    scheduler = SimpleNamespace(metrics_collector=SimpleNamespace(labels=LABELS))
    controller = Controller(TokenSelectConfig(control="tcp://127.0.0.1:0"))
    told = telemetry.Telemetry.start(scheduler, controller)
    assert told.is_watched
    with closing(told._server):
        exporter.assert_called_once_with(LABELS)
        told.send(reading(cached_tokens=10, attended_tokens=5))
        for _ in range(2):
            told.send_change(reading(cached_tokens=20, attended_tokens=7))
            assert ask(told._server)["attended_share"] == 0.2
        told.send(reading(cached_tokens=20, attended_tokens=7))
        told.send(reading(cached_tokens=20, attended_tokens=7))
        assert ask(told._server)["attended_share"] is None
    shares = [call.args[0].attended_share for call in exporter().update.mock_calls]
    assert shares == [0.5, 0.2, 0.2, 0.2, None]


def test_telemetry_needs_neither_prometheus_nor_endpoints():
    told = telemetry.Telemetry.start(SimpleNamespace(metrics_collector=None), Controller(TokenSelectConfig()))
    told.send(reading())
    told.send_change(reading())
    assert not told.is_watched


def test_an_endpoint_that_cannot_be_bound_is_told_at_the_start():
    controller = Controller(TokenSelectConfig(publish="ipc:///nowhere/at/all"))
    with pytest.raises(ConfigError, match="publish: expected a free endpoint .*/nowhere/at/all"):
        telemetry.Telemetry(controller, labels=None)


# As in SGLang: one process writes, another one collects.
EXPORT = """
import sys
from dataclasses import replace
from sglang_tokenselect.prometheus import PrometheusExporter
from snapshots import SNAPSHOT

assert "prometheus_client" not in sys.modules
exporter = PrometheusExporter({"model_name": "m", "tp_rank": 0})
none = dict.fromkeys(("mass", "itl_target_ms"))
exporter.update(replace(SNAPSHOT, **none, policy="load", counters=SNAPSHOT.counters | {"votes": 200}))
exporter.update(replace(SNAPSHOT, **none, hit_ratio=None))
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> dict[str, list]:
    folder = tmp_path_factory.mktemp("prometheus")
    paths = os.pathsep.join(map(str, (REPO, REPO / "tests" / "support")))
    env = os.environ | {"PROMETHEUS_MULTIPROC_DIR": str(folder), "PYTHONPATH": paths}
    subprocess.run([sys.executable, "-c", EXPORT], env=env, check=True)
    registry = prometheus_client.CollectorRegistry()
    prometheus_client.multiprocess.MultiProcessCollector(registry, path=str(folder))
    samples: dict[str, list] = {}
    for metric in registry.collect():
        for sample in metric.samples:
            samples.setdefault(sample.name, []).append(sample)
    return samples


def test_metrics_show_the_last_snapshot_with_the_labels(exported):
    values = {**SNAPSHOT.to_dict(), **SNAPSHOT.counters}
    for metric in METRICS:
        if metric.source not in ("mass", "itl_target_ms", "hit_ratio"):
            [sample] = exported[metric.full_name]
            assert sample.value == values[metric.source], metric
            assert sample.labels == {"model_name": "m", "tp_rank": "0"}


def test_what_is_not_known_is_no_number(exported):
    assert not {"tokenselect_attention_mass", "tokenselect_itl_target_milliseconds"} & exported.keys()
    assert math.isnan(exported["tokenselect_cache_hit_ratio"][0].value)


def test_one_policy_is_on(exported):
    policies = {sample.labels["policy"]: sample.value for sample in exported["tokenselect_policy"]}
    assert policies == {"fixed": 0, "load": 0, "slo": 1}


def test_every_counter_has_a_metric_and_every_metric_a_source():
    sources = {metric.source for metric in METRICS}
    assert {field.name for field in fields(Counters)} == SNAPSHOT.counters.keys()
    assert SNAPSHOT.counters.keys() <= sources
    assert sources <= SNAPSHOT.to_dict().keys() | SNAPSHOT.counters.keys()
    assert len({metric.name for metric in METRICS}) == len(METRICS)


def test_the_dashboard_shows_every_metric_and_no_other():
    expressions = [target["expr"] for panel in json.loads(DASHBOARD)["panels"] for target in panel.get("targets", ())]
    named = {name for expression in expressions for name in re.findall(r"tokenselect_\w+", expression)}
    assert named == {metric.full_name for metric in (*METRICS, POLICY)}


def test_the_dashboard_asks_for_metrics_that_sglang_has():
    [package] = importlib.util.find_spec("sglang").submodule_search_locations
    collector = Path(package, "srt", "observability", "metrics_collector.py").read_text()
    named = set(re.findall(r"(sglang:\w+?)(?:_bucket)?\b(?!_)", DASHBOARD))
    assert len(named) >= 4
    assert not [name for name in named if f'"{name}"' not in collector]


def test_the_dashboards_panels_do_not_overlap():
    taken = set()
    for panel in json.loads(DASHBOARD)["panels"]:
        x, y, width, height = (panel["gridPos"][side] for side in "xywh")
        cells = {(column, row) for column in range(x, x + width) for row in range(y, y + height)}
        assert not cells & taken and x + width <= 24, panel["title"]
        taken |= cells
