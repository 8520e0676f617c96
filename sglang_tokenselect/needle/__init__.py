# SPDX-License-Identifier: Apache-2.0
"""A small retrieval model that real SGLang serves on a CPU, and the tasks that it was trained on."""

from __future__ import annotations

from pathlib import Path


def checkpoint_path() -> Path:
    """The folder of the shipped checkpoint, in Hugging Face format."""
    return Path(__file__).parent / "checkpoint"
