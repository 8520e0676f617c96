# SPDX-License-Identifier: Apache-2.0
"""What a run of the tests ran with, kept for the README's table of versions: `pytest --ran NAME`.

Hooks of pytest, made known by tests/conftest.py. The file is `.ci/ran/NAME.json`, which git ignores;
`make versions` (versions.py) takes over what is there.
"""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

RAN = Path(__file__).parents[2] / ".ci" / "ran"
PACKAGES = ("sglang", "torch", "triton", "flashinfer-python")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--ran", metavar="NAME", help="keeps in .ci/ran/NAME.json what ran (suite, smoke or gpu)")


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    name = session.config.getoption("--ran")
    if name and exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        stats = session.config.pluginmanager.getplugin("terminalreporter").stats
        RAN.mkdir(exist_ok=True)
        (RAN / f"{name}.json").write_text(json.dumps(record(stats), indent=2) + "\n")


def record(stats: dict[str, list[Any]]) -> dict[str, Any]:
    """Versions, device, counts and failures, from the reports of pytest's terminal."""
    bad = [report.nodeid for outcome in ("failed", "error") for report in stats.get(outcome, [])]
    counts = {outcome: len(stats.get(outcome, [])) for outcome in ("passed", "skipped", "deselected")}
    return {**versions(), "device": device(), **counts, "failed": bad}


def versions() -> dict[str, str]:
    """Without local parts: 2.11.0+cu130 is 2.11.0 built for one CUDA."""
    return {"python": platform.python_version(), **{name: version(name).partition("+")[0] for name in PACKAGES}}


def device() -> str:
    """'x86_64 CPU', 'NVIDIA H200' or '2 x NVIDIA H200'."""
    count = torch.cuda.device_count()
    if count == 0:
        return f"{platform.machine()} CPU"
    return f"{count} x " * (count > 1) + torch.cuda.get_device_name(0)
