# SPDX-License-Identifier: Apache-2.0
"""SGLang's own attention harness against this backend: its cases, its dense reference.

The harness looks the backend up in SGLang's registry and drives it as the model runner does. All
its requests are shorter than the default window, so law 1 makes the dense reference the right one;
the sparse part of the runners is tested in test_gpu_runner.py and tests/unit.
"""

from __future__ import annotations

import importlib
import sys
import types
import unittest
from dataclasses import replace

import pytest
import torch
from accelerator import DEVICE, HAS_CUDA, NEEDS_CUDA
from sglang.srt.plugins import load_plugins

from sglang_tokenselect import create_runner, refusals

KIT = "sglang.test.kits.attention_unittest"
# The kernels for GPUs serve neither float32 nor the harness's head_dim of 16.
SETTING = {"dtype": torch.bfloat16, "head_dim": 64} if HAS_CUDA else {"dtype": torch.float32}


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


def page_size_1(cases):
    """Page size 1 is the one that the backend serves: the cases of other sizes run with it too."""
    return [replace(case, page_size=1) for case in cases]


CASES = page_size_1(dense_attention.make_dense_cases("tokenselect"))
DECODE_CASES = [case for case in CASES if case.forward_mode.is_decode()]
EXTEND_CASES = [case for case in CASES if not case.forward_mode.is_decode()]
SLIDING_CASES = page_size_1(
    (
        *dense_attention.make_swa_no_prefix_input_config_cases("tokenselect"),
        *dense_attention.make_swa_prefix_input_config_cases("tokenselect"),
    )
)


@pytest.fixture(autouse=True)
def harness_model(monkeypatch):
    monkeypatch.setattr(refusals, "ARCHITECTURES", (*refusals.ARCHITECTURES, "TinyForCausalLM"))
    # The harness's model runner has a model without modules.
    layer = types.SimpleNamespace(
        layer_id=0,
        sliding_window_size=-1,
        logit_cap=0.0,
        logit_capping_method="tanh",
        scaling=1.0,
        k_scale=None,
        v_scale=None,
    )
    monkeypatch.setattr(create_runner, "attention_layers", lambda model: [layer])
    # Its model's configuration has no dtype.
    monkeypatch.setattr(dense_attention.TinyModelConfig, "dtype", SETTING["dtype"], raising=False)
    with torch.no_grad():
        yield


def test_the_harness_has_extend_and_decode_cases():
    assert {case.forward_mode.name for case in CASES} == {"EXTEND", "DECODE"}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_dense_case(case):
    dense_attention.run_dense_attention_case(unittest.TestCase(), case, device=DEVICE, **SETTING)


@pytest.mark.parametrize("case", DECODE_CASES, ids=lambda case: case.name)
def test_graph_sequence_case(case):
    """The calls of capture and padded replay, without a graph: padded rows must be harmless."""
    cuda_graph.run_dense_cuda_graph_decode_case(unittest.TestCase(), case, device=DEVICE, **SETTING)


# In which SGLang 0.5.17's own FlashInfer backend, which attends to them here, fails in the same way on an H200.
FAIL_WITH_FLASHINFER = {
    "mha_extend_prefix_exact_page",
    "mha_extend_cross_page_boundary",
    "mha_extend_ragged_page_boundary",
    "mha_extend_page32_cross_boundary",
}


@NEEDS_CUDA
@pytest.mark.parametrize(
    "case", [case for case in EXTEND_CASES if case.name not in FAIL_WITH_FLASHINFER], ids=lambda case: case.name
)
def test_prefill_graph_case(case):
    """The attention between the pieces of a breakable prefill graph, with a padded batch."""
    split_op = importlib.import_module(f"{KIT}.runner_modes.split_op_runner")
    split_op.run_dense_split_op_extend_case(unittest.TestCase(), case, breakable=True, device=DEVICE, **SETTING)


@NEEDS_CUDA
@pytest.mark.parametrize("case", SLIDING_CASES, ids=lambda case: case.name)
def test_sliding_window_case(case, monkeypatch):
    known = {*dense_attention._SWA_DECODE_EXTEND_WINDOW, "tokenselect"}
    monkeypatch.setattr(dense_attention, "_SWA_DECODE_EXTEND_WINDOW", frozenset(known))
    dense_attention.run_dense_attention_case(unittest.TestCase(), case, device=DEVICE, **SETTING)
