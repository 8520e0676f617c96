# SPDX-License-Identifier: Apache-2.0
"""Settings that must be in place before SGLang or a kernel is imported by any test; what `smoke` means; `--ran`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from ran import pytest_addoption, pytest_sessionfinish

__all__ = ["pytest_addoption", "pytest_sessionfinish"]  # hooks, found by their names

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

SMOKE = [Path(__file__).parent / folder for folder in ("unit", "kernels")]


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All of two folders is `smoke`; tests of servers say so themselves."""
    for item in items:
        if any(item.path.is_relative_to(folder) for folder in SMOKE):
            item.add_marker(pytest.mark.smoke)
