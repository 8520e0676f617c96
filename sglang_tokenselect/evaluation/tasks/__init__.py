# SPDX-License-Identifier: Apache-2.0
"""Synthetic long-context tasks: prompts of any length, their answers and scores. See `registry.py`."""

from __future__ import annotations
