# SPDX-License-Identifier: Apache-2.0
"""Float8 keys and values with scales: written, read, scored and attended to, against what they stand for in float64."""

from __future__ import annotations

from types import SimpleNamespace

import naive
import pytest
import torch

from sglang_tokenselect.backend import TokenSelectAttnBackend
from sglang_tokenselect.config import TokenSelectConfig
from sglang_tokenselect.fidelity.head_group import AttentionRule
from sglang_tokenselect.fidelity.measure import measure_fidelity
from sglang_tokenselect.kernels.reference.attention import attend_positions
from sglang_tokenselect.kernels.reference.decode import select_for_query
from sglang_tokenselect.kernels.reference.kv import RequestKV
from sglang_tokenselect.kernels.reference.positions import Rope
from sglang_tokenselect.kernels.reference.window import Window
from sglang_tokenselect.patches import kv_scales
from sglang_tokenselect.planner import ForwardPlan, RequestPlan
from sglang_tokenselect.runner import LayerInput
from sglang_tokenselect.torch_runner import TorchRunner

FP8 = torch.float8_e4m3fn
HEADS, KV_HEADS, DIM, SCALING = 4, 2, 16, 0.25
# Neither is a power of two, so that a product that is rounded once more shows.
K_SCALE, V_SCALE = 0.3, 1.7
NUM_TOKENS = 200


def draw_pools(seed: int = 0) -> torch.Tensor:
    """[2, num_slots, KV_HEADS, DIM] float8, keys and values."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(2, NUM_TOKENS + 20, KV_HEADS, DIM, generator=generator)
    return (values / torch.tensor([K_SCALE, V_SCALE]).view(2, 1, 1, 1)).to(FP8)


def exact(pools: torch.Tensor) -> torch.Tensor:
    """What they stand for."""
    return pools.double() * torch.tensor([K_SCALE, V_SCALE], dtype=torch.float64).view(2, 1, 1, 1)


def draw_slots(seed: int = 1) -> torch.Tensor:
    return torch.randperm(NUM_TOKENS + 20, generator=torch.Generator().manual_seed(seed))[:NUM_TOKENS].int()


def draw_queries(count: int, seed: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(count, HEADS, DIM, generator=generator)


def test_what_is_read_is_what_is_stored_times_its_scale():
    pools, slots = draw_pools(), draw_slots()
    kv = RequestKV(*pools, slots, K_SCALE, V_SCALE)
    for found, expected in zip((kv.keys(slice(3, 90)), kv.values(slice(3, 90))), exact(pools), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected[slots[3:90]], rtol=1e-7, atol=0)
    one = kv.of_head(1)
    assert torch.equal(one.keys(slice(None)), kv.keys(slice(None))[:, 1:])
    assert torch.equal(one.values(slice(None)), kv.values(slice(None))[:, 1:])
    assert one.key_pool.untyped_storage().data_ptr() == pools.untyped_storage().data_ptr()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_other_pools_are_read_as_they_are(dtype):
    pools = exact(draw_pools()).to(dtype)
    kv = RequestKV(*pools, torch.arange(5))
    assert torch.equal(kv.keys(slice(None)), pools[0, :5]) and torch.equal(kv.values(slice(None)), pools[1, :5])


@pytest.mark.parametrize("logit_cap", [0.0, 1.5])
def test_attention_is_the_naive_one(logit_cap):
    pools, slots, query = draw_pools(), draw_slots(), draw_queries(1)
    positions = torch.tensor([0, 5, 6, 33, 90, 199])
    kv = RequestKV(*pools, slots, K_SCALE, V_SCALE)
    found = attend_positions(query, kv, positions, scaling=SCALING, logit_cap=logit_cap)[0]
    keys, values = exact(pools)[:, slots[positions].long()]
    expected = naive.attend(query[0], keys, values, SCALING, logit_cap)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_selection_is_the_naive_one():
    pools, slots, query, window = draw_pools(), draw_slots(), draw_queries(1)[0], Window(4, 12, 8)
    found = select_for_query(query, RequestKV(*pools, slots, K_SCALE, V_SCALE), window)
    candidates = exact(pools)[0, slots[4 : NUM_TOKENS - 8].long()]
    assert [i - 4 for i in found.tolist()] == naive.ranking(naive.score(query, candidates), 12)


def run(pools: torch.Tensor, scales: tuple[float, float], **options) -> tuple[list[torch.Tensor], TorchRunner]:
    """Outputs of a prefill and some decode steps, and the runner, whose samples of attention mass are all taken."""
    config = TokenSelectConfig(
        **{"sink": 4, "budget": 24, "local": 8, "block": 16, "sub_block": 4, "min_len": 0, "mass_every": 1, **options}
    )
    ropes = {0: Rope.from_theta(1e4, DIM, NUM_TOKENS, dtype=torch.float64)} if config.is_compact else {}
    runner = TorchRunner(config, draw_slots().unsqueeze(0), ropes, (0,))
    runner.samples_mass = True
    layer = LayerInput(0, *pools, SCALING, 0.0, *scales)
    queries = draw_queries(NUM_TOKENS).to(torch.float32 if pools.dtype == FP8 else torch.float64)
    out = []
    for start, end in ((0, 150), (150, 194), *((n, n + 1) for n in range(194, NUM_TOKENS))):
        is_decode = end - start == 1
        runner.begin(ForwardPlan(is_decode, (RequestPlan(0, end, 0, end - start),)))
        out.append(runner.run(queries[start:end], layer).double())
    return out, runner


@pytest.mark.parametrize(
    "options", [{}, {"positions": "compact"}, {"selector": "page"}, {"dense_layers": (0,)}], ids=str
)
def test_a_runner_computes_what_the_keys_and_values_stand_for(options):
    pools = draw_pools()
    found, runner = run(pools, (K_SCALE, V_SCALE), **options)
    expected, twin = run(exact(pools), (1.0, 1.0), **options)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert runner.counters == twin.counters
    masses = [[share for share, _ in of.take_masses()] for of in (runner, twin)]
    assert masses[0] == pytest.approx(masses[1], rel=1e-5)
    assert len(masses[0]) == (0 if "dense_layers" in options else 6) and all(0 < share < 1 for share in masses[0])


def test_fidelity_is_measured_on_what_they_stand_for():
    pools, slots, query = draw_pools(), draw_slots(), draw_queries(1)[0]
    rule, sizes = AttentionRule(SCALING), {"num_sink": 4, "num_local": 8}
    found = measure_fidelity(query, RequestKV(*pools, slots, K_SCALE, V_SCALE), (0, 16), rule, **sizes)
    expected = measure_fidelity(query.double(), RequestKV(*exact(pools), slots), (0, 16), rule, **sizes)
    for name in ("mass", "recall", "error"):
        one, other = getattr(found, name).double(), getattr(expected, name)
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, equal_nan=True)


def attention_layer(k_scale=None, v_scale=None, floats=(None, None)) -> SimpleNamespace:
    """SGLang's RadixAttention, as far as it is looked at."""
    return SimpleNamespace(
        layer_id=0,
        scaling=SCALING,
        logit_cap=0.0,
        head_dim=DIM,
        tp_q_head_num=HEADS,
        k_scale=k_scale,
        v_scale=v_scale,
        k_scale_float=floats[0],
        v_scale_float=floats[1],
    )


PARAMETERS = [torch.nn.Parameter(torch.tensor(x), requires_grad=False) for x in (K_SCALE, V_SCALE)]
READ = (pytest.approx(K_SCALE), pytest.approx(V_SCALE))
LAYERS = {
    "no scales": (attention_layer(), (1.0, 1.0)),
    "of --quantization-param-path": (attention_layer(K_SCALE, V_SCALE), READ),
    "of a checkpoint": (attention_layer(*PARAMETERS, floats=(K_SCALE, V_SCALE)), READ),
}


@pytest.mark.parametrize(("layer", "read"), LAYERS.values(), ids=LAYERS.keys())
def test_scales_for_writing_and_reading_are_the_same(layer, read):
    kv_scales.settle_scales([layer], FP8)
    assert kv_scales.read_scales(layer) == read
    assert kv_scales.write_scales(layer) == (layer.k_scale, layer.v_scale)
    assert kv_scales.are_scaled([layer]) == (read is READ)
    kv_scales.settle_scales([layer], torch.bfloat16)  # where the pool has the model's dtype
    assert kv_scales.read_scales(layer) == (1.0, 1.0) and kv_scales.write_scales(layer) == (None, None)
    assert layer.k_scale_float is layer.v_scale_float is None
    assert not kv_scales.are_scaled([layer])


class KeepingRunner:
    """Attends to nothing and keeps what it is given."""

    dense = None

    def delegates(self, layer_id: int) -> bool:
        return False

    def run(self, query: torch.Tensor, layer: LayerInput) -> torch.Tensor:
        self.layer = layer
        return query


@pytest.mark.parametrize(("pool_dtype", "scaled"), [(FP8, True), (FP8, False), (torch.bfloat16, True)], ids=str)
def test_the_backend_reads_back_what_it_writes_to_sglangs_pool(pool_dtype, scaled):
    from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

    pool = MHATokenToKVPool(
        size=8,
        page_size=1,
        dtype=pool_dtype,
        head_num=KV_HEADS,
        head_dim=DIM,
        layer_num=1,
        device="cpu",
        enable_memory_saver=False,
    )
    layer = attention_layer(*((K_SCALE, V_SCALE) if scaled else (None, None)))
    kv_scales.settle_scales([layer], pool_dtype)
    backend = TokenSelectAttnBackend.__new__(TokenSelectAttnBackend)
    backend.token_to_kv_pool, backend.runner, backend._recorder = pool, KeepingRunner(), None
    slots, generator = torch.tensor([5, 2, 7]), torch.Generator().manual_seed(3)
    new = torch.randn(2, 3, KV_HEADS, DIM, generator=generator)
    batch = SimpleNamespace(out_cache_loc=slots)
    with torch.inference_mode():
        backend.forward_decode(torch.randn(3, HEADS * DIM), *new.clone(), layer, batch)
    given = backend.runner.layer
    assert given.key_pool.dtype == given.value_pool.dtype == pool_dtype
    assert (given.k_scale, given.v_scale) == ((K_SCALE, V_SCALE) if scaled and pool_dtype == FP8 else (1.0, 1.0))
    kv = given.request_kv(slots)
    rounding = torch.finfo(pool_dtype).eps  # half a step, and as much again for the division
    for found, expected in zip((kv.keys(slice(None)), kv.values(slice(None))), new, strict=True):
        torch.testing.assert_close(found.float(), expected, rtol=rounding, atol=0.01)
