# SPDX-License-Identifier: Apache-2.0
"""What the selection's memory is told to be, which flags make it smaller, and how its end is told at start."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sglang_tokenselect.config import TokenSelectConfig
from sglang_tokenselect.gpu_buffers import MOST_RUNNING_REQUESTS, GpuBuffers, reserved_bytes
from sglang_tokenselect.memory_plan import MemoryPlan, told_if_out_of_memory
from sglang_tokenselect.patches import kv_budget
from sglang_tokenselect.refusals import Refusal

LLAMA_8B = SimpleNamespace(
    get_num_attention_heads=lambda tp_size: 32 // tp_size,
    get_num_kv_heads=lambda tp_size: 8 // tp_size,
    head_dim=128,
    dtype=torch.bfloat16,
    context_len=131_072,
    num_hidden_layers=32,
)


def plan_for(max_running_requests=256, max_bs=160, **options):
    args = SimpleNamespace(
        attention_backend="tokenselect",
        max_running_requests=max_running_requests,
        cuda_graph_config=SimpleNamespace(decode=SimpleNamespace(max_bs=max_bs)),
        tp_size=1,
        mem_fraction_static=0.85,
        _tokenselect=options,
    )
    return MemoryPlan(TokenSelectConfig(**options), LLAMA_8B, torch.bfloat16, args)


def test_the_plan_is_what_is_left_out_of_the_kv_pool():
    plan = plan_for()
    assert plan.num_bytes == reserved_bytes(plan.config, LLAMA_8B, torch.bfloat16, plan.server_args)
    buffers = GpuBuffers.allocate(plan.config, shape_of(plan), 256, "meta")
    assert 0 < buffers.cache_bytes - plan.cache_bytes < 4096  # what a cache of no entries has


def shape_of(plan):
    from sglang_tokenselect.model_shape import ModelShape

    return ModelShape.of(plan.model_config, plan.kv_cache_dtype, plan.model_config.num_hidden_layers)


@pytest.mark.parametrize("options", [{}, {"budget": 1000, "max_budget": 4096}, {"min_budget": 2048}], ids=str)
@pytest.mark.parametrize("requests", [None, 256])
def test_each_saving_is_what_a_server_with_the_smaller_value_has(options, requests):
    plan = plan_for(requests, **options)
    found = {saving.flag: saving for saving in plan.savings()}
    budget = "--tokenselect-max-budget" if "max_budget" in options else "--tokenselect-budget"
    assert set(found) == {
        "--tokenselect-cache-requests",
        budget,
        "--max-running-requests",
        "--cuda-graph-max-bs-decode",
    }
    smaller = {
        "--tokenselect-cache-requests": plan_for(requests, **options, cache_requests=128),
        budget: plan_for(requests, budget=found[budget].smaller),
        "--max-running-requests": plan_for((requests or MOST_RUNNING_REQUESTS) // 2, **options),
        "--cuda-graph-max-bs-decode": plan_for(requests, 80, **options),
    }
    for flag, saving in found.items():
        assert saving.smaller == saving.value // 2
        assert saving.num_bytes == plan.num_bytes - smaller[flag].num_bytes > 0
    saved = [saving.num_bytes for saving in plan.savings()]
    assert saved == sorted(saved, reverse=True)


def test_nothing_is_saved_where_nothing_is_left():
    assert "--cuda-graph-max-bs-decode" not in plan_for(max_bs=None).advice()
    assert "--tokenselect-cache-requests" not in plan_for(cache_requests=0).advice()


def test_a_gpu_that_is_too_small_is_told_with_the_flags_that_help():
    plan = plan_for()
    said = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has 1.00 MiB free. If reserved but unallocated..."
    message = (
        rf"GPU memory: expected {plan.num_bytes:,} bytes for buffers, got 'CUDA out of memory. .* 1.00 MiB free.' "
        r"\(a --mem-fraction-static below 0.85 .*; --tokenselect-cache-requests 128 instead of 256 saves [1-9]\d+ MB"
    )
    with pytest.raises(Refusal, match=message) as raised, told_if_out_of_memory("buffers", plan):
        raise torch.OutOfMemoryError(said)
    assert isinstance(raised.value.__cause__, torch.OutOfMemoryError)


def test_other_errors_pass():
    with pytest.raises(ZeroDivisionError), told_if_out_of_memory("buffers", plan_for()):
        raise ZeroDivisionError


def test_a_kv_pool_without_room_is_told_with_the_flags_that_help():
    plan = plan_for(cache_requests=512)
    configurator = SimpleNamespace(
        server_args=plan.server_args, device="cuda", model_config=LLAMA_8B, kv_cache_dtype=torch.bfloat16
    )
    assert kv_budget._leave_room(plan.num_bytes + 1, configurator) == 1
    message = (
        rf"GPU memory: expected more than the {plan.num_bytes:,} bytes of the selection, got {plan.num_bytes:,} "
        r"\(a --mem-fraction-static above 0.85 .*--tokenselect-cache-requests 256 instead of 512 saves"
    )
    with pytest.raises(Refusal, match=message):
        kv_budget._leave_room(plan.num_bytes, configurator)
