# SPDX-License-Identifier: Apache-2.0
"""Settings that must be in place before SGLang is imported by any test."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
