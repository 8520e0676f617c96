# SPDX-License-Identifier: Apache-2.0
"""Settings that must be in place before SGLang or a kernel is imported by any test."""

from __future__ import annotations

import os

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
