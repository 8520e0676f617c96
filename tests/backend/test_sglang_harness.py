# SPDX-License-Identifier: Apache-2.0
"""SGLang's own attention harness against this backend: its cases, its dense reference.

The harness looks the backend up in SGLang's registry and drives it as the model runner does. All
its requests are shorter than the default window, so law 1 makes the dense reference the right one;
the sparse part of the runner is tested in tests/unit.
"""

from __future__ import annotations

import importlib
import sys
import types
import unittest
from dataclasses import replace

import pytest
import torch
from sglang.srt.plugins import load_plugins

from sglang_tokenselect import refusals

KIT = "sglang.test.kits.attention_unittest"
TORCH_CPU = {"dtype": torch.float32, "device": "cpu"}


def _stub_what_needs_cuda_libraries() -> None:
    """In SGLang 0.5.17 the graph module of the harness imports cases that load CUDA libraries."""
    name = f"{KIT}.attention_methods.dual_chunk_attention"
    try:
        importlib.import_module(name)
    except ImportError:
        stub = types.ModuleType(name)
        stub.__getattr__ = lambda attribute: None
        sys.modules[name] = stub


load_plugins()
_stub_what_needs_cuda_libraries()
dense_attention = importlib.import_module(f"{KIT}.attention_methods.dense_attention")
cuda_graph = importlib.import_module(f"{KIT}.runner_modes.cuda_graph_decode_runner")
# Page size 1 is the one that the backend serves: the cases of other sizes run with it too.
CASES = [replace(case, page_size=1) for case in dense_attention.make_dense_cases("tokenselect")]
DECODE_CASES = [case for case in CASES if case.forward_mode.is_decode()]


@pytest.fixture(autouse=True)
def harness_model(monkeypatch):
    monkeypatch.setattr(refusals, "ARCHITECTURES", (*refusals.ARCHITECTURES, "TinyForCausalLM"))
    with torch.no_grad():
        yield


def test_the_harness_has_extend_and_decode_cases():
    assert {case.forward_mode.name for case in CASES} == {"EXTEND", "DECODE"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_dense_case(case):
    dense_attention.run_dense_attention_case(unittest.TestCase(), case, **TORCH_CPU)


@pytest.mark.parametrize("case", DECODE_CASES, ids=lambda case: case.name)
def test_graph_sequence_case(case):
    """The calls of capture and padded replay, without a graph: padded rows must be harmless."""
    cuda_graph.run_dense_cuda_graph_decode_case(unittest.TestCase(), case, **TORCH_CPU)
