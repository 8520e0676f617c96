# SPDX-License-Identifier: Apache-2.0
"""Where the kernel tests run: native on a GPU, or in Triton's interpreter (TRITON_INTERPRET=1) without one."""

from __future__ import annotations

import pytest
import torch

HAS_CUDA = torch.cuda.is_available()
DEVICE = "cuda" if HAS_CUDA else "cpu"
NEEDS_CUDA = pytest.mark.skipif(not HAS_CUDA, reason="needs a GPU: Triton's interpreter has no bfloat16 and no float8")
BIG = pytest.mark.skipif(not HAS_CUDA, reason="too large for Triton's interpreter")
# Of the queries and of the keys.
DTYPES = [
    pytest.param(torch.float16, torch.float16, id="fp16"),
    pytest.param(torch.bfloat16, torch.bfloat16, id="bf16", marks=NEEDS_CUDA),
    pytest.param(torch.float16, torch.float8_e4m3fn, id="fp16-fp8keys", marks=NEEDS_CUDA),
    pytest.param(torch.bfloat16, torch.float8_e4m3fn, id="bf16-fp8keys", marks=NEEDS_CUDA),
]
