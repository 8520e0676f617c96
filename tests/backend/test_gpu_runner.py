# SPDX-License-Identifier: Apache-2.0
"""The two runners are one backend: GpuRunner against TorchRunner over the same traffic.

On a GPU with FlashInfer, eager and in CUDA graphs; without one in Triton's interpreter, FlashInfer replaced by twins.
"""

from __future__ import annotations

import random
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from accelerator import DEVICE, HAS_CUDA, NEEDS_CUDA
from attention_twins import DecodeTwin, PrefillTwin

pytest.importorskip("sglang.kernels.ops.kvcache.kv_indices", reason="GPUs are served with SGLang 0.5.17")

from sglang_tokenselect import gpu_buffers
from sglang_tokenselect.config import TokenSelectConfig
from sglang_tokenselect.effort import effort_at
from sglang_tokenselect.gpu_buffers import GpuBuffers
from sglang_tokenselect.gpu_runner import GpuRunner
from sglang_tokenselect.kernels.reference import prefill
from sglang_tokenselect.kernels.reference.positions import Rope
from sglang_tokenselect.kernels.reference.window import Window
from sglang_tokenselect.kernels.shared_segment import SharedSegment
from sglang_tokenselect.model_shape import ModelShape
from sglang_tokenselect.planner import ForwardPlan, RequestPlan
from sglang_tokenselect.request_options import RequestOptions
from sglang_tokenselect.runner import Graph, LayerInput, Step
from sglang_tokenselect.torch_runner import TorchRunner

SMALL = {"sink": 4, "budget": 24, "local": 16, "block": 32, "sub_block": 8, "min_len": 60, "theta": 0.8}
LAYERS = (1, 3)  # ids of layers that select, in a model that has others
MAX_LEN, NUM_ROWS, MAX_ROWS = 320, 7, 4
LARGER = 8  # times as many tokens, where a GPU is fast enough
ROPE_THETA = 1e4
DTYPE = torch.bfloat16 if HAS_CUDA else torch.float16
# Logits are spread, so that the members at the margin of a selection weigh little and are seldom near-ties.
QUERY_SPREAD = 3.0
TOLERANCE = 0.04 if HAS_CUDA else 0.003


KV_SCALES = (0.25, 0.5)
"""Powers of two, so that they round nothing."""

NEAR_TIES = 0.02
"""Share of queries whose selection may turn at its margin, where the order of a sum's terms decides."""


@dataclass(frozen=True)
class RoundingRope(Rope):
    """Rounds what it rotates as the GPU does, in whatever dtype it is handed on."""

    stored: torch.dtype = DTYPE

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return super().rotate(x, positions).to(self.stored).to(x.dtype)


@contextmanager
def rounded_means(dtype: torch.dtype):
    """Mean queries of the reference as a GPU stores them. Left exact, other members would win many near-ties."""
    exact = prefill.mean_queries
    with mock.patch.object(prefill, "mean_queries", lambda *args: exact(*args).to(dtype).float()):
        yield


class Pair:
    """Both runners on one paged pool, whose slots are scattered and NaN where nothing was written."""

    def __init__(
        self,
        *,
        heads=(4, 2),
        head_dim=64,
        dtype=DTYPE,
        kv_dtype=None,
        kv_scales=(1.0, 1.0),
        logit_cap=0.0,
        scale=1,
        delegate=None,
        **options,
    ) -> None:
        """
        Args:
            kv_dtype: of the pool, if not that of the queries.
            kv_scales: that keys and values are divided by before they are stored.
        """
        sizes = {name: size * scale for name, size in SMALL.items() if name != "theta"}
        self.config = TokenSelectConfig(**{**SMALL, **sizes, **options})
        self.scale, self.max_len = scale, MAX_LEN * scale
        self.heads, self.head_dim, self.dtype, self.logit_cap = heads, head_dim, dtype, logit_cap
        self.kv_dtype, self.kv_scales = kv_dtype or dtype, kv_scales
        num_slots = NUM_ROWS * self.max_len + 1
        shape = (len(LAYERS), 2, num_slots, heads[1], head_dim)
        self.pools = torch.full(shape, torch.nan, dtype=self.kv_dtype, device=DEVICE)
        order = 1 + torch.randperm(num_slots - 1, generator=torch.Generator().manual_seed(0))
        self.req_to_token = torch.zeros(NUM_ROWS + 1, self.max_len, dtype=torch.int32, device=DEVICE)
        self.req_to_token[1:] = order.view(NUM_ROWS, self.max_len).int()
        self.pools[:, :, 0] = 0  # where SGLang writes the tokens that pad a graph
        rope = None
        if self.config.is_compact:
            table = Rope.from_theta(ROPE_THETA, head_dim, self.max_len).cos_sin_cache
            rope = RoundingRope(table.to(DEVICE), theta=ROPE_THETA, stored=dtype)
        ropes = dict.fromkeys(LAYERS, rope) if rope else {}
        self.expected = TorchRunner(self.config, self.req_to_token, ropes, LAYERS)
        self.actual = self._make_gpu_runner(rope, **(delegate or {}))
        self.expected.samples_mass = self.actual.samples_mass = True

    def _make_gpu_runner(self, rope: Rope | None, **delegate) -> GpuRunner:
        shape = ModelShape(len(LAYERS), *self.heads, self.head_dim, self.dtype, self.kv_dtype, self.max_len)
        buffers = GpuBuffers.allocate(self.config, shape, MAX_ROWS, DEVICE)
        attentions = DecodeTwin(self.logit_cap, rope), PrefillTwin(self.logit_cap, rope)
        if HAS_CUDA:
            from sglang_tokenselect.flashinfer_attention import AttentionSpec, DecodeAttention, PrefillAttention

            spec = AttentionSpec(shape, self.logit_cap, rope.theta if rope else None)
            workspace = torch.empty(128 * 2**20, dtype=torch.uint8, device=DEVICE)
            attentions = (
                DecodeAttention(spec, workspace, buffers.int_workspace, MAX_ROWS),
                PrefillAttention(spec, workspace),
            )
        sampled = [partial(self.layer, i, self.pools) for i in range(len(LAYERS))]
        return GpuRunner(
            self.config, LAYERS, buffers, self.req_to_token, *attentions, rope=rope, sampled_layers=sampled, **delegate
        )

    def set_level(self, level: int) -> None:
        for runner in (self.expected, self.actual):
            runner.set_effort(effort_at(self.config, level))

    def layer(self, index: int, pools: torch.Tensor) -> LayerInput:
        scales = self.kv_scales if pools is self.pools else (1.0, 1.0)
        return LayerInput(LAYERS[index], *pools[index], self.head_dim**-0.5, self.logit_cap, *scales)

    def store(self, row: int, start: int, kv: torch.Tensor) -> None:
        """kv: [num_layers, 2, num_tokens, num_kv_heads, head_dim]."""
        slots = self.req_to_token[row, start : start + kv.shape[2]].long()
        self.pools[:, :, slots] = (kv.float() / self._factors()).to(self.kv_dtype)

    def expect(self, plan: ForwardPlan, queries: torch.Tensor) -> torch.Tensor:
        """What TorchRunner answers in float32: [num_layers, num_tokens, num_qo_heads, head_dim]."""
        pools = self.pools.float() * self._factors()
        self.expected.begin(plan)
        with rounded_means(self.dtype):
            return torch.stack([self.expected.run(q.float(), self.layer(i, pools)) for i, q in enumerate(queries)])

    def _factors(self) -> torch.Tensor:
        """[2, 1, 1, 1]."""
        return torch.tensor(self.kv_scales, device=DEVICE).view(2, 1, 1, 1)

    def run_layers(self, queries: torch.Tensor) -> torch.Tensor:
        return torch.stack([self.actual.run(q, self.layer(i, self.pools)) for i, q in enumerate(queries)])


class Graphs:
    """Decode steps of a Pair as SGLang's graph runner drives them: static inputs, padded to a captured batch size."""

    def __init__(self, pair: Pair) -> None:
        self.pair = pair
        self.rows = torch.zeros(MAX_ROWS, dtype=torch.int64, device=DEVICE)
        self.seq_lens = torch.ones(MAX_ROWS, dtype=torch.int64, device=DEVICE)
        shape = (len(LAYERS), MAX_ROWS, pair.heads[0], pair.head_dim)
        self.queries = torch.zeros(shape, dtype=pair.dtype, device=DEVICE)
        self.captured = {}
        pair.actual.reserve_graph_rows(MAX_ROWS, pair.max_len)
        for batch_size in (MAX_ROWS, 2):
            for step in Step:
                self.captured[batch_size, step] = self._capture(batch_size, step)

    def _batch(self, batch_size: int) -> SimpleNamespace:
        return SimpleNamespace(
            batch_size=batch_size, req_pool_indices=self.rows[:batch_size], seq_lens=self.seq_lens[:batch_size]
        )

    def _capture(self, batch_size: int, step: Step):
        plan = ForwardPlan(True, tuple(RequestPlan(0, 1, i, 1) for i in range(batch_size)))
        self.pair.actual.begin(plan, self._batch(batch_size), Graph.CAPTURE, step=step)
        queries = self.queries[:, :batch_size]
        for _ in range(2):
            self.pair.run_layers(queries)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = self.pair.run_layers(queries)
        return graph, out

    def run(self, plan: ForwardPlan, queries: torch.Tensor) -> torch.Tensor:
        count = len(plan.requests)
        batch_size = 2 if count <= 2 else MAX_ROWS
        padding = tuple(RequestPlan(0, 1, i, 1) for i in range(count, batch_size))
        self.rows.zero_()
        self.seq_lens.fill_(1)
        self.rows[:count] = torch.tensor([r.req_pool_idx for r in plan.requests])
        self.seq_lens[:count] = torch.tensor([r.seq_len for r in plan.requests])
        self.queries[:, :count] = queries
        told = [r.seq_len for r in plan.requests], [r.window for r in plan.requests], plan.shared
        assert self.pair.actual.fits_graph(*told)
        step = self.pair.actual.decode_step(*told)
        padded = ForwardPlan(True, (*plan.requests, *padding), plan.shared)
        self.pair.actual.begin(padded, self._batch(batch_size), Graph.REPLAY)
        assert self.pair.actual.selects == (step is not Step.EVERYTHING)
        graph, out = self.captured[batch_size, step]
        graph.replay()
        assert not out.isnan().any()
        return out[:, :count]


class Traffic:
    """Requests that come in chunks, decode, end, and hand their rows on; seeded."""

    def __init__(self, pair: Pair, *, graphs: Graphs | None = None, seed: int = 0) -> None:
        self.pair, self.graphs, self.rng = pair, graphs, random.Random(seed)
        self.generator = torch.Generator(DEVICE).manual_seed(seed)
        self.errors = {True: [], False: []}
        self.dense_errors: list[float] = []
        self.lengths: dict[int, int] = {}
        self.windows: dict[int, Window] = {}
        self.shared: list[SharedSegment] = []  # by rows of req_to_token
        self.last_query: dict[int, torch.Tensor] = {}

    def randn(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator, device=DEVICE)

    def extend(self, *parts: tuple[int, int], generated: int = 0) -> None:
        """Each part is (row, number of new tokens, in units of the pair's scale).

        Args:
            generated: how many of the last tokens of each were generated before a retraction.
        """
        requests, queries, first = [], [], 0
        for row, count in parts:
            count *= self.pair.scale
            start = self.lengths.get(row, 0)
            self._store(row, start, count)
            self.lengths[row] = start + count
            prompt_len = start + count - generated if generated else None
            requests.append(RequestPlan(row, start + count, first, count, self.windows.get(row), prompt_len))
            queries.append(self._block_queries(start, count))
            first += count
        plan, queries = self._plan(requests, is_decode=False), torch.cat(queries, dim=1)
        self.pair.actual.begin(plan, SimpleNamespace(batch_size=len(parts)))
        self._compare(plan, queries, self.pair.run_layers(queries))

    def decode(self, *rows: int, similar: bool) -> None:
        """One token for each row; queries that are like the last ones, or not at all."""
        requests, queries = [], []
        for row in rows:
            start = self.lengths[row]
            self._store(row, start, 1)
            self.lengths[row] = start + 1
            requests.append(RequestPlan(row, start + 1, len(requests), 1, self.windows.get(row)))
            queries.append(self._next_query(row, similar))
        plan, queries = self._plan(requests, is_decode=True), torch.cat(queries, dim=1)
        if self.graphs is not None:
            actual = self.graphs.run(plan, queries)
        else:
            batch = SimpleNamespace(
                batch_size=len(rows),
                req_pool_indices=torch.tensor([r.req_pool_idx for r in requests], device=DEVICE),
                seq_lens=torch.tensor([r.seq_len for r in requests], device=DEVICE),
            )
            self.pair.actual.begin(plan, batch)
            actual = self.pair.run_layers(queries)
        self._compare(plan, queries, actual)

    def fork(self, row: int, *others: int, after: int) -> None:
        """Requests that go on from another one, sharing all but the first `after` tokens with them alone."""
        length = self.lengths[row]
        for other in others:
            self.pair.req_to_token[other, :length] = self.pair.req_to_token[row, :length]
            self.lengths[other] = length
        self.shared.append(SharedSegment((row, *others), after, length))

    def _plan(self, requests: list[RequestPlan], *, is_decode: bool) -> ForwardPlan:
        index = {request.req_pool_idx: i for i, request in enumerate(requests)}
        present = [(segment, [index[row] for row in segment.rows if row in index]) for segment in self.shared]
        shared = [replace(segment, rows=tuple(sorted(rows))) for segment, rows in present if len(rows) > 1]
        return ForwardPlan(is_decode, tuple(requests), tuple(shared))

    def move(self, row: int, to: int) -> None:
        """The radix cache gives a running request other slots: those of a row that is not used."""
        table, length = self.pair.req_to_token, self.lengths[row]
        old, new = table[row, :length].clone(), table[to, :length].clone()
        self.pair.pools[:, :, new.long()] = self.pair.pools[:, :, old.long()]
        self.pair.pools[:, :, old.long()] = torch.nan
        table[row, :length], table[to, :length] = new, old

    def end(self, row: int) -> None:
        """Its keys are gone, and its row may be another's."""
        slots = self.pair.req_to_token[row].long()
        self.pair.pools[:, :, slots] = torch.nan
        del self.lengths[row]

    def _store(self, row: int, start: int, count: int) -> None:
        shape = (len(LAYERS), 2, count, self.pair.heads[1], self.pair.head_dim)
        self.pair.store(row, start, self.randn(*shape).to(self.pair.dtype))

    def _queries(self, count: int) -> torch.Tensor:
        queries = self.randn(len(LAYERS), count, self.pair.heads[0], self.pair.head_dim)
        return (QUERY_SPREAD * queries).to(self.pair.dtype)

    def _block_queries(self, start: int, count: int) -> torch.Tensor:
        """Alike within a block: what its mean query hardly votes for, none of them attends to much."""
        block = torch.arange(start, start + count, device=DEVICE) // self.pair.config.block
        alike = self._queries(int(block[-1]) + 1)[:, block]
        return (alike.float() + 0.1 * self._queries(count).float()).to(self.pair.dtype)

    def _next_query(self, row: int, similar: bool) -> torch.Tensor:
        fresh = self._queries(1)
        if similar and row in self.last_query:
            fresh = (self.last_query[row].float() + 0.1 * fresh.float()).to(self.pair.dtype)
        self.last_query[row] = fresh
        return fresh

    def _compare(self, plan: ForwardPlan, queries: torch.Tensor, actual: torch.Tensor) -> None:
        expected = self.pair.expect(plan, queries)
        assert not actual.isnan().any(), plan
        errors = (actual.float() - expected).abs().amax(dim=(2, 3)).cpu()
        selecting = torch.cat([self._selecting(request, plan.is_decode) for request in plan.requests])
        self.errors[plan.is_decode] += errors[:, selecting].flatten().tolist()
        self.dense_errors += errors[:, ~selecting].flatten().tolist()

    def _selecting(self, request: RequestPlan, is_decode: bool) -> torch.Tensor:
        """[num_queries] bool."""
        runner, block = self.pair.expected, self.pair.config.block
        if is_decode:
            return torch.tensor([request.seq_len > runner.decode_window_of(request).dense_len])
        position = torch.arange(request.prefix_len, request.seq_len)
        start = torch.clamp(position // block * block, min=request.prefix_len)
        return start > runner.extend_window_of(request).dense_len

    def check(self) -> None:
        assert max(self.dense_errors, default=0) < TOLERANCE
        for is_decode, errors in self.errors.items():
            wrong = sum(error > TOLERANCE for error in errors)
            print(f"is_decode={is_decode}: {wrong} of {len(errors)} queries, dense {max(self.dense_errors):.4f}")
            assert wrong <= NEAR_TIES * len(errors), f"is_decode={is_decode}: {wrong} of {len(errors)}"


def run_traffic(pair: Pair, *, graphs: bool = False, seed: int = 0) -> None:
    traffic = Traffic(pair, graphs=Graphs(pair) if graphs else None, seed=seed)
    traffic.extend((1, 150))
    traffic.extend((2, 1), (1, 90), (3, 61))  # a chunk in the middle of a batch; one token; one past min_len
    traffic.extend((3, 32), (4, 40))
    for similar in (False, True, True):
        traffic.decode(1, 2, 3, similar=similar)
    traffic.move(1, to=6)
    traffic.decode(1, 3, similar=True)
    traffic.decode(2, 4, similar=True)  # all short
    traffic.decode(1, 2, 3, 4, similar=True)
    traffic.end(3)
    traffic.extend((3, 200))  # another request in its row
    traffic.decode(3, 1, similar=True)
    traffic.decode(3, 1, similar=True)
    for _ in range(3):
        traffic.decode(*traffic.rng.sample([1, 2, 3, 4], k=traffic.rng.randint(1, 4)), similar=True)
    traffic.extend((4, 12))
    while traffic.lengths[4] < pair.config.min_len + 3:  # crosses it while decoding
        traffic.decode(4, similar=True)
    traffic.check()
    expected, actual = pair.expected.report(), pair.actual.report()
    assert (actual.votes, actual.reuses) == (expected.votes, expected.reuses)
    assert actual.block_votes == expected.block_votes
    assert actual.reuses > 0 and actual.votes > 0 and actual.block_votes > 0


def run_branches(pair: Pair, *, graphs: bool = False) -> None:
    """Requests that fork, and branches that do; a step of one branch, of some, and of all with a stranger."""
    traffic = Traffic(pair, graphs=Graphs(pair) if graphs else None)
    traffic.extend((1, 200))
    traffic.fork(1, 2, 3, after=0)
    traffic.extend((1, 7), (2, 40), (3, 70))
    for rows, similar in (((1, 2, 3), False), ((3, 1), True), ((2,), True), ((1, 2, 3), True)):
        traffic.decode(*rows, similar=similar)
    traffic.fork(3, 4, after=200 * pair.scale)
    traffic.shared[0] = replace(traffic.shared[0], rows=(1, 2, 3, 4), end=200 * pair.scale)
    traffic.extend((4, 9), (3, 1))
    traffic.extend((5, 100))
    for rows, similar in (
        ((4, 3, 2, 1), True),
        ((4, 3), False),
        ((5, 4, 3, 1), True),
        ((5, 1), True),
        ((1, 2, 4), True),
    ):
        traffic.decode(*rows, similar=similar)
    traffic.check()
    expected, actual = pair.expected.report(), pair.actual.report()
    assert actual == expected
    assert actual.shared_queries > 15 and actual.reuses > 0 and actual.votes > 0


def run_levels(pair: Pair, *, graphs: bool = False) -> None:
    """Requests with and without options of their own, while the effort level goes down and up."""
    config = pair.config
    traffic = Traffic(pair, graphs=Graphs(pair) if graphs else None)
    for row, options in ((2, RequestOptions(budget=config.largest_budget)), (3, RequestOptions(is_dense=True))):
        traffic.windows[row] = options.window(config)
    traffic.extend((1, 120), (2, 130), (3, 61), (4, 2))
    for level in 2 * (0, 0, 1, 4, 4, 3, -1, -1, 0, 2):
        pair.set_level(level)
        traffic.decode(1, 2, 3, 4, similar=True)
    traffic.check()
    expected, actual = pair.expected.report(), pair.actual.report()
    assert actual == expected
    assert actual.reuses > 0 and actual.dense_queries > 20
    check_masses(pair)


def taken(pair: Pair) -> list[tuple[float, int]]:
    """The GPU's samples, none of them on its way any more."""
    if HAS_CUDA:
        torch.cuda.synchronize()
    return pair.actual.take_masses()


def check_masses(pair: Pair) -> None:
    """The GPU's samples are those of the reference, one step later."""
    expected, actual = pair.expected.take_masses(), taken(pair)
    assert len(expected) == len(actual) + 1 > 5
    shares = torch.tensor([share for share, _ in expected])
    assert shares.min() > 0 and shares.max() < 1
    assert [level for _, level in expected[:-1]] == [level for _, level in actual]
    assert (shares[:-1] - torch.tensor([share for share, _ in actual])).abs().max() < TOLERANCE


OPTIONS = {
    "absolute": {},
    "compact": {"positions": "compact"},
    "sum of votes": {"combine": "sum", "sub_block": 16},
    "one mean": {"selector": "mean"},
    "never reused": {"theta": 1.1},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_the_runners_agree(options):
    if options.get("theta", 0) > 1:
        pair = Pair(**options)
        traffic = Traffic(pair)
        traffic.extend((1, 100), (2, 80))
        for _ in range(3):
            traffic.decode(1, 2, similar=True)
        traffic.check()
        assert pair.actual.report().reuses == pair.expected.report().reuses == 0
    else:
        run_traffic(Pair(**options))


@pytest.mark.parametrize("positions", ["absolute", "compact"])
def test_scaled_keys_and_values(positions):
    """Of any dtype, since Triton's interpreter knows no float8."""
    run_levels(Pair(kv_scales=KV_SCALES, positions=positions, max_budget=2 * SMALL["budget"], mass_every=1))


@pytest.mark.parametrize("positions", ["absolute", "compact"])
def test_branches(positions):
    run_branches(Pair(positions=positions, min_group=2))


def test_groups_that_are_too_small_are_left_alone():
    pair = Pair(min_group=3)
    segments = (SharedSegment((0, 1, 2), 0, 200), SharedSegment((0, 1), 200, 300))
    assert pair.actual.decode_step([310, 310, 310], [], segments) is Step.SHARES
    assert pair.actual.decode_step([310, 310, 30], [], segments) is Step.SELECTS
    assert pair.actual.decode_step([310, 310, 310], [], segments[1:]) is Step.SELECTS
    assert pair.actual.decode_step([30, 30, 30], [], segments) is Step.EVERYTHING


def test_more_kv_heads_than_the_scratch_has_places_for():
    assert Pair(heads=(9, 9)).actual.min_group == 0 < Pair(heads=(8, 8)).actual.min_group


@pytest.mark.parametrize("positions", ["absolute", "compact"])
def test_levels_and_own_budgets(positions):
    run_levels(Pair(positions=positions, max_budget=2 * SMALL["budget"], mass_every=1))


def test_samples_of_requests_that_end_are_forgotten():
    pair = Pair(mass_every=1)
    traffic = Traffic(pair)
    traffic.extend((1, 100), (2, 100))
    for rows in ((1,), (2,), (1,), (1,)):
        traffic.decode(*rows, similar=True)
    assert len(taken(pair)) == 1
    length = traffic.lengths[1]
    traffic.end(1)
    traffic.extend((1, length))  # another of the same length in its row
    traffic.decode(1, similar=True)
    assert not taken(pair)


def test_only_the_servers_own_effort_is_sampled():
    pair = Pair(mass_every=1)
    traffic = Traffic(pair)
    traffic.windows[1] = RequestOptions(budget=0).window(pair.config)
    traffic.extend((1, 100))
    for _ in range(3):
        traffic.decode(1, similar=True)
    assert not taken(pair) and not pair.expected.take_masses()


def test_rows_that_pad_a_graph_have_room():
    """Dense requests may fill the graphs' slots, but for one of each row."""
    pair = Pair()
    pair.actual.reserve_graph_rows(MAX_ROWS, pair.max_len)
    own = [RequestOptions(is_dense=True).window(pair.config)] * 2 + [None]
    assert pair.actual.fits_graph([100, 96, 61], own)  # 100 + 96 + 44
    assert not pair.actual.fits_graph([100, 97, 61], own)


def small_scratch(monkeypatch) -> None:
    """For less than a batch of blocks, and for less than a decode step."""
    monkeypatch.setattr(gpu_buffers, "OWN_CANDIDATES", MAX_LEN)
    monkeypatch.setattr(gpu_buffers, "CANDIDATES", 2 * MAX_LEN)
    monkeypatch.setattr(gpu_buffers, "PREFILL_BLOCKS", 3)


def test_prefill_in_several_parts(monkeypatch):
    small_scratch(monkeypatch)
    pair = Pair()
    pair.actual.warm_up(pair.layer(0, pair.pools))
    run_traffic(pair)


@pytest.mark.parametrize("positions", ["absolute", "compact"])
def test_requests_that_were_retracted(positions):
    """What they had generated selects by itself: much, some behind a bit of prompt, and across the window's end."""
    pair = Pair(positions=positions)
    traffic = Traffic(pair)
    traffic.extend((1, 100), (2, 90), (3, 20))
    traffic.extend((1, 40), (2, 40), (3, 40), generated=40)
    traffic.extend((1, 30), (2, 9), generated=9)
    traffic.decode(1, 2, 3, similar=True)
    traffic.check()
    assert pair.actual.report() == pair.expected.report()


def test_decode_in_several_parts(monkeypatch):
    small_scratch(monkeypatch)
    pair = Pair(theta=0.99)
    pair.actual.reserve_graph_rows(MAX_ROWS, pair.max_len)
    traffic = Traffic(pair)
    for row in (1, 2, 3, 4):
        traffic.extend((row, 300))
    assert pair.actual.fits_graph([60] * 4) and pair.actual.fits_graph([301]) and not pair.actual.fits_graph([301] * 4)
    traffic.decode(1, 2, 3, 4, similar=False)
    traffic.decode(1, 2, 3, 4, similar=False)
    traffic.check()
    assert pair.actual.report().votes == 2 * 4 * len(LAYERS)


def test_groups_in_several_parts(monkeypatch):
    """Branches of which the scratch holds two at once."""
    small_scratch(monkeypatch)
    monkeypatch.setattr(gpu_buffers, "CANDIDATES", MAX_LEN)
    pair = Pair(min_group=2, theta=1.1)
    pair.actual.reserve_graph_rows(MAX_ROWS, pair.max_len)
    traffic = Traffic(pair)
    traffic.extend((1, 280))
    traffic.fork(1, 2, 3, 4, after=0)
    traffic.extend((1, 1), (2, 2), (3, 3), (4, 4))
    assert not pair.actual.fits_graph([281] * 4, [], (SharedSegment((0, 1, 2, 3), 0, 280),))
    for _ in range(2):
        traffic.decode(1, 2, 3, 4, similar=False)
    traffic.check()


def test_more_requests_than_cache_entries():
    pair = Pair(cache_requests=1, max_reuse=1)
    traffic = Traffic(pair)
    traffic.extend((1, 100), (2, 80), (4, 20))
    for _ in range(3):
        traffic.decode(1, 2, 4, similar=True)
    report = pair.actual.report()
    assert report.uncached_queries == 3
    assert report.reuses == 0 and report.votes == 3 * 2 * len(LAYERS)


def test_a_finished_request_leaves_its_cache_entry_empty():
    """All queries pass for alike, so a vote that stayed would be reused."""
    pair = Pair(cache_requests=1, theta=-1.0)
    traffic = Traffic(pair)
    traffic.extend((1, 100), (2, 100))
    traffic.decode(1, similar=True)
    traffic.decode(1, similar=True)
    assert pair.actual.report().reuses == len(LAYERS)
    traffic.end(1)
    traffic.decode(2, similar=True)
    report = pair.actual.report()
    assert (report.uncached_queries, report.reuses, report.votes) == (0, len(LAYERS), 2 * len(LAYERS))


def test_a_new_request_in_a_row_does_not_reuse_the_old_ones_vote():
    pair = Pair(theta=-1.0)
    traffic = Traffic(pair)
    for _ in range(2):
        traffic.extend((1, 100))
        traffic.decode(1, similar=True)
        traffic.end(1)
    report = pair.actual.report()
    assert (report.votes, report.reuses) == (2 * len(LAYERS), 0)


def test_without_a_budget_nobody_votes():
    pair = Pair(budget=0)
    traffic = Traffic(pair)
    traffic.extend((1, 100))
    traffic.decode(1, similar=True)
    traffic.check()
    assert pair.actual.report().votes == pair.expected.report().votes == 0


class RecordingBackend:
    """Stands where SGLang's own backend does, and tells what it was asked for."""

    def __init__(self) -> None:
        self.begun: list[Graph] = []
        self.reserved: tuple[int, int] | None = None

    def begin(self, forward_batch: SimpleNamespace, graph: Graph) -> None:
        self.begun.append(graph)

    def reserve_graph_rows(self, max_rows: int, longest: int) -> None:
        self.reserved = (max_rows, longest)


@pytest.mark.parametrize("dense_in_all_forwards", [False, True])
def test_what_selects_nothing_is_delegated(dense_in_all_forwards):
    dense = RecordingBackend()
    pair = Pair(delegate={"dense": dense, "dense_in_all_forwards": dense_in_all_forwards})
    runner, other_layer = pair.actual, LAYERS[0] + 1
    batch = SimpleNamespace(batch_size=1, req_pool_indices=torch.ones(1, dtype=torch.int64, device=DEVICE))
    for seq_len, selects in ((60, False), (61, True)):
        batch.seq_lens = torch.tensor([seq_len], device=DEVICE)
        runner.begin(ForwardPlan(True, (RequestPlan(1, seq_len, 0, 1),)), batch)
        assert runner.selects == selects
        assert runner.delegates(LAYERS[0]) == (not selects)
        assert runner.delegates(other_layer)
    runner.begin(ForwardPlan(False, (RequestPlan(1, 64, 0, 64),)), batch)
    assert runner.delegates(LAYERS[0])
    assert len(dense.begun) == (3 if dense_in_all_forwards else 2)
    runner.reserve_graph_rows(2, MAX_LEN)
    assert dense.reserved == (2, MAX_LEN if dense_in_all_forwards else 60)
    with pytest.raises(ValueError, match="CUDA graph batch size: expected at most 4, got 5"):
        runner.reserve_graph_rows(5, MAX_LEN)


def test_the_bytes_are_told_before_they_are_allocated():
    shape = ModelShape(2, 4, 2, 64, torch.float16, torch.float16, MAX_LEN)
    config = TokenSelectConfig(**SMALL)
    told = GpuBuffers.allocate(config, shape, MAX_ROWS, "meta")
    allocated = GpuBuffers.allocate(config, shape, MAX_ROWS, DEVICE)
    assert told.total_bytes == allocated.total_bytes > told.cache_bytes > 0


GPU_MODELS = {
    "groups of 4": {"heads": (8, 2), "head_dim": 128},
    "one KV head each": {"heads": (4, 4)},
    "fp16": {"dtype": torch.float16},
    "logit cap": {"head_dim": 128, "logit_cap": 20.0},
}


@NEEDS_CUDA
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("positions", ["absolute", "compact"])
@pytest.mark.parametrize("model", GPU_MODELS.values(), ids=GPU_MODELS.keys())
def test_the_runners_agree_on_a_gpu(model, positions, graphs):
    run_traffic(Pair(positions=positions, **model), graphs=graphs)


FLOAT8 = {"kv_dtype": torch.float8_e4m3fn, "kv_scales": KV_SCALES}


@NEEDS_CUDA
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_runners_agree_on_float8(head_dim, graphs):
    run_traffic(Pair(head_dim=head_dim, **FLOAT8), graphs=graphs)


@NEEDS_CUDA
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
def test_levels_and_branches_of_float8(graphs):
    run_levels(Pair(max_budget=2 * SMALL["budget"], mass_every=1, **FLOAT8), graphs=graphs)
    run_branches(Pair(min_group=2, **FLOAT8), graphs=graphs)


@NEEDS_CUDA
def test_float8_kernels_warm_up():
    pair = Pair(**FLOAT8)
    pair.actual.warm_up(pair.layer(0, pair.pools))


@NEEDS_CUDA
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("positions", ["absolute", "compact"])
def test_levels_on_a_gpu(positions, graphs):
    run_levels(Pair(positions=positions, max_budget=2 * SMALL["budget"], mass_every=1), graphs=graphs)


@NEEDS_CUDA
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("positions", ["absolute", "compact"])
def test_branches_on_a_gpu(positions, graphs):
    run_branches(Pair(positions=positions, min_group=2), graphs=graphs)
    run_branches(Pair(positions=positions, min_group=2, scale=LARGER), graphs=graphs)


@NEEDS_CUDA
def test_graphs_that_are_captured_again():
    """As SGLang does when weights are updated: over other buffers than before."""
    pair = Pair()
    Graphs(pair)
    run_traffic(pair, graphs=True)


@NEEDS_CUDA
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "graphs"])
@pytest.mark.parametrize("positions", ["absolute", "compact"])
def test_the_runners_agree_on_larger_requests(positions, graphs):
    run_traffic(Pair(positions=positions, scale=LARGER), graphs=graphs)
