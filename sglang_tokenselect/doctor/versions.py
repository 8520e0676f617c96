# SPDX-License-Identifier: Apache-2.0
"""Versions of everything that takes part, and whether SGLang is in the range that is served."""

from __future__ import annotations

import platform
import shutil
import subprocess

import sglang_tokenselect
from sglang_tokenselect import compat
from sglang_tokenselect.doctor.report import Section

PACKAGES = (
    "sglang",
    "torch",
    "triton",
    "flashinfer-python",
    "flashinfer-jit-cache",
    "flashinfer-cubin",
    "sglang-kernel",
    "transformers",
)


def examine() -> Section:
    import torch

    facts: dict[str, str | None] = {"sglang-tokenselect": sglang_tokenselect.__version__}
    facts.update({package: compat.find_version(package) for package in PACKAGES})
    facts["python"], facts["os"] = platform.python_version(), platform.platform()
    facts["cuda of torch"], facts["nvidia driver"] = torch.version.cuda, _find_driver()
    section = Section(facts)
    try:
        compat.check_sglang_version()
    except (RuntimeError, ImportError) as error:  # ImportError: SGLang is not installed
        section.problems.append(str(error))
    return section


def _find_driver() -> str | None:
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else f"nvidia-smi: {(done.stderr or done.stdout).strip()}"
