# SPDX-License-Identifier: Apache-2.0
"""FlashInfer over lists of slots, planned and rotating as we ask it to, against plain attention in float32."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import torch
from accelerator import DEVICE, NEEDS_CUDA
from attention_twins import DecodeTwin, PrefillTwin

from sglang_tokenselect.gpu_buffers import INT_WORKSPACE_BYTES
from sglang_tokenselect.kernels.reference.positions import Rope
from sglang_tokenselect.model_shape import ModelShape
from sglang_tokenselect.runner import LayerInput
from sglang_tokenselect.slot_lists import SlotLists

if TYPE_CHECKING:
    from sglang_tokenselect.flashinfer_attention import AttentionSpec

pytestmark = NEEDS_CUDA

HEADS, KV_HEADS, HEAD_DIM, NUM_SLOTS = 8, 2, 128, 6000
THETA = 1e4
LENGTHS = (1, 2, 44, 128, 129, 700, 2688)
NUM_QUERIES = (1, 2, 16, 128, 100, 128, 128)


KV_SCALES = (0.25, 2.0)


@dataclass(frozen=True)
class Setting:
    """Of keys and values: whether FlashInfer rotates, how they are stored, what they are divided by."""

    theta: float | None = None
    kv_dtype: torch.dtype = torch.bfloat16
    kv_scales: tuple[float, float] = (1.0, 1.0)

    @property
    def spec(self) -> AttentionSpec:
        from sglang_tokenselect.flashinfer_attention import AttentionSpec

        shape = ModelShape(1, HEADS, KV_HEADS, HEAD_DIM, torch.bfloat16, self.kv_dtype, 4096)
        return AttentionSpec(shape, rope_theta=self.theta)

    @property
    def rope(self) -> Rope | None:
        return self.theta and Rope(Rope.from_theta(self.theta, HEAD_DIM, 4096).cos_sin_cache.to(DEVICE))


SETTINGS = {
    "absolute": Setting(),
    "compact": Setting(theta=THETA),
    "float8": Setting(kv_dtype=torch.float8_e4m3fn),
    "scaled float8": Setting(kv_dtype=torch.float8_e4m3fn, kv_scales=KV_SCALES),
}


@pytest.fixture(params=SETTINGS.values(), ids=SETTINGS.keys())
def setting(request):
    return request.param


def make_lists(lengths) -> SlotLists:
    kv_indptr = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    slots = torch.cat([torch.randperm(NUM_SLOTS)[:length] for length in lengths]).int()
    return SlotLists(kv_indptr.to(DEVICE), kv_indptr, slots.to(DEVICE))


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE).to(torch.bfloat16)


def compare(attention, twin, query: torch.Tensor, setting: Setting) -> None:
    scales = setting.kv_scales
    stored = [(randn(NUM_SLOTS, KV_HEADS, HEAD_DIM) / scale).to(setting.kv_dtype) for scale in scales]
    exact = [pool.float() * scale for pool, scale in zip(stored, scales, strict=True)]
    actual = attention.run(query, LayerInput(0, *stored, HEAD_DIM**-0.5, 0.0, *scales))
    expected = twin.run(query, LayerInput(0, *exact, HEAD_DIM**-0.5, 0.0))
    torch.testing.assert_close(actual, expected, atol=2e-2, rtol=2e-2)


def test_prefill(setting):
    from sglang_tokenselect.flashinfer_attention import PrefillAttention

    torch.manual_seed(0)
    attention = PrefillAttention(setting.spec, torch.empty(128 * 2**20, dtype=torch.uint8, device=DEVICE))
    twin = PrefillTwin(rope=setting.rope)
    for order in (slice(None), slice(None, None, -1), slice(3, 4)):
        lists = make_lists(LENGTHS[order])
        qo_indptr = torch.tensor([0, *torch.tensor(NUM_QUERIES[order]).cumsum(0).tolist()], dtype=torch.int32)
        attention.plan(qo_indptr, lists)
        twin.plan(qo_indptr, lists)
        compare(attention, twin, randn(int(qo_indptr[-1]), HEADS, HEAD_DIM), setting)


def test_decode_eager_and_replanned_over_captured_buffers(setting):
    from sglang_tokenselect.flashinfer_attention import DecodeAttention

    torch.manual_seed(0)
    workspaces = [torch.empty(size, dtype=torch.uint8, device=DEVICE) for size in (128 * 2**20, INT_WORKSPACE_BYTES)]
    attention = DecodeAttention(setting.spec, *workspaces, len(LENGTHS))
    twin = DecodeTwin(rope=setting.rope)
    lists = make_lists(LENGTHS)
    static = SlotLists(
        torch.zeros_like(lists.kv_indptr),
        torch.arange(len(LENGTHS) + 1, dtype=torch.int32),
        torch.zeros(len(LENGTHS) * max(LENGTHS), dtype=torch.int32, device=DEVICE),
    )
    query = randn(len(LENGTHS), HEADS, HEAD_DIM)
    attention.plan_capture(static)
    for lengths in (LENGTHS, LENGTHS[::-1], (1,) * len(LENGTHS)):
        lists = make_lists(lengths)
        twin.plan(lists)
        attention.plan(lists)
        compare(attention, twin, query, setting)
        static.kv_indptr.copy_(lists.kv_indptr)
        static.kv_indices[: len(lists.kv_indices)] = lists.kv_indices
        attention.plan_replay(SlotLists(static.kv_indptr, lists.kv_indptr_cpu, static.kv_indices))
        compare(attention, twin, query, setting)
