# SPDX-License-Identifier: Apache-2.0
"""Host-side pieces of GPU serving: rows of a forward, bytes that are told beforehand, what a model's layers share."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from sglang_tokenselect.backend import TokenSelectAttnBackend
from sglang_tokenselect.config import TokenSelectConfig
from sglang_tokenselect.gpu_buffers import GpuBuffers, graph_index_slots, reserved_bytes
from sglang_tokenselect.kernels.reference.positions import Rope
from sglang_tokenselect.model_shape import ModelShape, common_logit_cap, sliding_layers
from sglang_tokenselect.patches import forward_requests, kv_budget
from sglang_tokenselect.patches.rope import common_rope
from sglang_tokenselect.planner import PADDING_ROW, StagedRequests, plan_forward
from sglang_tokenselect.prefix_groups import PrefixGroups
from sglang_tokenselect.refusals import Refusal
from sglang_tokenselect.runner import Step
from sglang_tokenselect.torch_runner import TorchRunner


def decode_batch(seq_lens, rows=None):
    mode = SimpleNamespace(is_decode=lambda: True)
    indices = None if rows is None else torch.tensor(rows)
    return SimpleNamespace(forward_mode=mode, seq_lens_cpu=torch.tensor(seq_lens), req_pool_indices=indices)


def test_rows_that_were_told_are_those_of_the_plan_and_padding_has_none():
    own = TokenSelectConfig(budget=5).window
    plan = plan_forward(decode_batch([9, 5, 1, 1]), StagedRequests([7, 3], [None, own]))
    assert [request.req_pool_idx for request in plan.requests] == [7, 3, PADDING_ROW, PADDING_ROW]
    assert [request.seq_len for request in plan.requests] == [9, 5, 1, 1]
    assert [request.window for request in plan.requests] == [None, own, None, None]


def test_rows_that_were_not_told_come_from_the_batch():
    assert [request.req_pool_idx for request in plan_forward(decode_batch([9, 5], rows=[4, 2])).requests] == [4, 2]


def test_the_hook_tells_the_backend_that_listens():
    told = []
    batch = SimpleNamespace(
        req_pool_indices_cpu=torch.tensor([5, 6]),
        reqs=["one", "other"],
        tree_cache="tree",
        forward_mode=SimpleNamespace(is_decode=lambda: False),
    )
    listener = SimpleNamespace(stage_requests=lambda *args, is_decode: told.append((*args, is_decode)))
    for backend in (listener, SimpleNamespace()):
        forward_requests._stage(None, object, batch, SimpleNamespace(attn_backend=backend))
    assert told == [([5, 6], ["one", "other"], "tree", False)]


@pytest.mark.parametrize(
    ("prompt_len", "prompt_end"), [(None, 30), (30, 30), (24, 24), (20, 20), (7, 20)], ids=lambda n: str(n)
)
def test_what_was_generated_before_a_retraction_is_no_prompt(prompt_len, prompt_end):
    mode = SimpleNamespace(is_decode=lambda: False)
    batch = SimpleNamespace(forward_mode=mode, seq_lens_cpu=torch.tensor([30]), extend_seq_lens_cpu=[10])
    [request] = plan_forward(batch, StagedRequests([7], [], prompt_lens=[prompt_len])).requests
    assert (request.prefix_len, request.prompt_end) == (20, prompt_end)


MODEL = SimpleNamespace(
    get_num_attention_heads=lambda tp_size: 8,
    get_num_kv_heads=lambda tp_size: 2,
    head_dim=64,
    context_len=30_000,
    num_hidden_layers=3,
    dtype=torch.bfloat16,
)


def server_args(**changes):
    graphs = SimpleNamespace(decode=SimpleNamespace(max_bs=16))
    given = {"attention_backend": "tokenselect", "max_running_requests": 32, "cuda_graph_config": graphs, "tp_size": 1}
    given["mem_fraction_static"] = 0.85
    return SimpleNamespace(**{**given, **changes})


@pytest.mark.parametrize("options", [{}, {"positions": "compact"}, {"dense_layers": (1,)}], ids=str)
def test_the_kv_pool_leaves_room_for_what_is_allocated(options):
    config, dtype = TokenSelectConfig(**options), torch.bfloat16
    shape = ModelShape.of(MODEL, dtype, MODEL.num_hidden_layers)
    least = GpuBuffers.allocate(config, shape, 32, "meta").total_bytes
    least += 4 * graph_index_slots(config, 16, MODEL.context_len)
    told = reserved_bytes(config, MODEL, dtype, server_args())
    assert told == least if config.is_compact else told > least
    args = server_args(_tokenselect=config.to_options())
    configurator = SimpleNamespace(server_args=args, device="cuda", model_config=MODEL, kv_cache_dtype=dtype)
    assert kv_budget._leave_room(10**12, configurator) == 10**12 - told
    with pytest.raises(Refusal, match="GPU memory: expected more than the .* bytes of the selection"):
        kv_budget._leave_room(told, configurator)


def test_what_is_allocated_has_the_models_dtype_whatever_the_keys_have():
    config = TokenSelectConfig(positions="compact")
    told = {reserved_bytes(config, MODEL, dtype, server_args()) for dtype in (torch.bfloat16, torch.float8_e4m3fn)}
    assert len(told) == 1
    shape = ModelShape.of(MODEL, torch.float8_e4m3fn, MODEL.num_hidden_layers)
    buffers = GpuBuffers.allocate(config, shape, 2, "meta")
    queries = (buffers.means, buffers.probe, buffers.rotated, buffers.caches.layer(0).query)
    assert {tensor.dtype for tensor in queries} == {torch.bfloat16}


def test_other_backends_keep_their_pool():
    configurator = SimpleNamespace(server_args=server_args(attention_backend="triton"), device="cuda")
    assert kv_budget._leave_room(5, configurator) is None


def layer(layer_id, **changes):
    given = {"sliding_window_size": -1, "logit_cap": 0.0, "logit_capping_method": "tanh"}
    return SimpleNamespace(layer_id=layer_id, **{**given, **changes})


def test_layers_with_a_window_and_a_cap():
    assert sliding_layers([layer(0), layer(1, sliding_window_size=64)]) == {1}
    assert common_logit_cap([layer(0, logit_cap=30.0), layer(1, logit_cap=30.0)]) == 30.0
    with pytest.raises(Refusal, match="one logit cap for all layers"):
        common_logit_cap([layer(0, logit_cap=30.0), layer(1)])
    with pytest.raises(Refusal, match="logits capped by tanh"):
        common_logit_cap([layer(0, logit_cap=30.0, logit_capping_method="rpn")])


def test_layers_must_share_a_rope_that_the_kernels_know():
    rope = Rope.from_theta(1e4, 64, 128)
    shared = common_rope({0: rope, 1: rope}, head_dim=64)
    assert shared.theta == 1e4 and shared.cos_sin_cache.dtype == torch.float32
    with pytest.raises(Refusal, match="one RoPE for all layers"):
        common_rope({0: rope, 1: Rope.from_theta(2e4, 64, 128)}, head_dim=64)
    with pytest.raises(Refusal, match="a RoPE of all 128 dimensions, in halves"):
        common_rope({0: rope}, head_dim=128)
    with pytest.raises(Refusal, match="is_neox_style=False"):
        common_rope({0: replace(rope, is_neox_style=False)}, head_dim=64)


def test_own_windows_are_known_before_and_after_a_forward_is_planned():
    """SGLang asks which graph a step needs, has it planned, and asks again for the graph to replay."""
    backend = TokenSelectAttnBackend.__new__(TokenSelectAttnBackend)
    backend.config = TokenSelectConfig(min_len=100, budget=5, sink=2, local=3)
    backend.runner = TorchRunner(backend.config, torch.zeros(9, 400, dtype=torch.int32), {})
    backend._staged, backend._windows, backend._shared, backend._recorder = None, (), (), None
    backend._prefix_groups = PrefixGroups(backend.config.min_group, 0)
    dense = SimpleNamespace(
        sampling_params=SimpleNamespace(custom_params={"tokenselect": {"dense": True}}),
        extra_key="|tokenselect:dense",
        rid="1",
    )
    plain = SimpleNamespace(sampling_params=SimpleNamespace(custom_params=None))
    batch = decode_batch([300], rows=[4])
    batch.forward_mode.is_idle = lambda: False
    for req, step in ((dense, Step.EVERYTHING), (plain, Step.SELECTS), (dense, Step.EVERYTHING)):
        backend.stage_requests([4], [req], None)
        assert backend.decode_step([300]) is step
        backend.init_forward_metadata_out_graph(batch)
        assert backend.decode_step([300]) is step
    backend.init_forward_metadata_out_graph(batch)  # of nobody who was told, as in warm-up
    assert backend.decode_step([300]) is Step.SELECTS


def test_options_that_nobody_checked_are_not_followed(caplog):
    backend = TokenSelectAttnBackend.__new__(TokenSelectAttnBackend)
    backend.config = TokenSelectConfig()
    backend._prefix_groups = PrefixGroups(0, 0)
    for custom_params, extra_key in (({"dense": True}, None), ({"dense": 5}, "|tokenselect:dense")):
        sampling = SimpleNamespace(custom_params={"tokenselect": custom_params})
        backend.stage_requests([4], [SimpleNamespace(sampling_params=sampling, extra_key=extra_key, rid="7")], None)
        assert backend._staged.windows == ()
    assert caplog.text.count("options of request 7 are not followed") == 2
