# SPDX-License-Identifier: Apache-2.0
"""Attention mass of what a decode row attended to: the mass, the positions read back, the query that was kept."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace

import naive
import pytest
import torch
from accelerator import DEVICE, HAS_CUDA
from paged import DecodeStep, PagedBatch

from sglang_tokenselect.kernels.cached_positions import attended_positions
from sglang_tokenselect.kernels.reference.mass import candidate_mass
from sglang_tokenselect.kernels.reference.window import Window
from sglang_tokenselect.kernels.selection_cache import Probe, SelectionCache, _begin_decode_kernel

NEEDS_CUDA = pytest.mark.skipif(not HAS_CUDA, reason="CUDA graphs and compiled kernels need a GPU")
WINDOW = Window(num_sink=5, budget=40, num_local=12)
ENDS = {"num_sink": 5, "num_local": 12}


def naive_mass(query, keys, is_chosen, *, num_sink, num_local, scaling, logit_cap=0.0) -> float:
    """query [H, d], keys [n, H_kv, d]: the share, head by head and token by token."""
    num_heads, group = query.shape[0], query.shape[0] // keys.shape[1]
    candidates = [j for j in range(keys.shape[0]) if num_sink <= j < keys.shape[0] - num_local]
    if not candidates:
        return 1.0
    share = 0.0
    for head in range(num_heads):
        logits = [scaling * sum(query[head].double() * keys[j, head // group].double()).item() for j in candidates]
        if logit_cap:
            logits = [logit_cap * math.tanh(x / logit_cap) for x in logits]
        held = naive.softmax(logits)
        share += sum(weight for weight, j in zip(held, candidates, strict=True) if is_chosen[j]) / num_heads
    return share


class Request:
    """One request's query and keys, its slots scattered in a pool that is NaN everywhere else."""

    def __init__(self, num_tokens: int, *, heads=(4, 2), head_dim=16, dtype=torch.float32, seed=0) -> None:
        generator = torch.Generator().manual_seed(seed)
        (num_qo_heads, num_kv_heads), num_slots = heads, num_tokens + 9
        self.query = torch.randn(num_qo_heads, head_dim, generator=generator).to(DEVICE, dtype)
        self.keys = torch.randn(num_tokens, num_kv_heads, head_dim, generator=generator).to(DEVICE, dtype)
        self.slots = torch.randperm(num_slots, generator=generator)[:num_tokens].to(DEVICE, torch.int32)
        self.is_chosen = (torch.rand(num_tokens, generator=generator) < 0.4).to(DEVICE)
        self.scaling = head_dim**-0.5

    def pool(self) -> torch.Tensor:
        pool = self.keys.new_full((self.keys.shape[0] + 9, *self.keys.shape[1:]), torch.nan)
        pool[self.slots.long()] = self.keys
        return pool

    def mass(self, **options) -> float:
        options = {**ENDS, "scaling": self.scaling, **options}
        found = candidate_mass(self.query, self.pool(), self.slots, self.is_chosen, **options)
        assert found.dtype == torch.float32 and found.shape == ()
        return found.item()

    def naive_mass(self, **options) -> float:
        options = {**ENDS, "scaling": self.scaling, **options}
        return naive_mass(self.query.cpu(), self.keys.cpu(), self.is_chosen.tolist(), **options)

    def check(self, *, rel: float = 2e-6, chunk: int = 16384, **options) -> None:
        expected = self.naive_mass(**options)
        assert 0 < expected < 1, "says nothing"
        assert self.mass(chunk=chunk, **options) == pytest.approx(expected, rel=rel)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 2), (7, 1), (8, 4)], ids=lambda h: f"{h[0]}q{h[1]}kv")
def test_mass_is_the_twins(heads, dtype):
    Request(50, heads=heads, dtype=dtype).check()


@pytest.mark.parametrize("logit_cap", [0.0, 0.5])
def test_float8_keys_with_a_scale(logit_cap):
    """The scale is a factor of the logits, before they are capped."""
    request, k_scale = Request(50), 0.3
    stored = (request.keys / k_scale).to(torch.float8_e4m3fn)
    request.keys = stored.double() * k_scale
    expected = request.naive_mass(logit_cap=logit_cap)
    request.keys = stored
    found = request.mass(logit_cap=logit_cap, scaling=request.scaling * k_scale)
    assert found == pytest.approx(expected, rel=2e-6)
    assert abs(found - request.mass(logit_cap=logit_cap)) > 1e-3


def test_every_head_counts_as_much():
    """One head has all its mass on the chosen, the others none: neither logits nor heads may be mixed up."""
    request = Request(40, heads=(4, 2))
    request.is_chosen[:] = False
    request.is_chosen[20] = True
    request.query[:] = 0
    request.keys[:] = 0
    request.keys[20, 1, 3] = 400.0
    request.keys[21, :, 5] = 400.0
    request.query[:, 5] = 1.0
    request.query[2, 3], request.query[2, 5] = 1.0, 0.0
    assert request.mass() == pytest.approx(0.25)


@pytest.mark.parametrize("logit_cap", [0.5, 3.0])
def test_soft_cap(logit_cap):
    request = Request(50)
    request.query *= 8
    request.check(logit_cap=logit_cap)
    assert abs(request.mass() - request.mass(logit_cap=logit_cap)) > 1e-3


@pytest.mark.parametrize("chunk", [1, 7, 12, 32, 33, 34, 50])
def test_chunks(chunk):
    """Borders anywhere among the 33 candidates, before, at and behind their end."""
    Request(50, dtype=torch.float16).check(chunk=chunk)


@pytest.mark.parametrize(
    "ends", [(0, 0), (0, 12), (5, 0), (30, 19), (30, 20), (49, 0), (0, 49), (50, 0), (60, 60)], ids=str
)
def test_edges_of_the_window(ends):
    request = Request(50, heads=(2, 1))
    expected = request.naive_mass(num_sink=ends[0], num_local=ends[1])
    assert request.mass(num_sink=ends[0], num_local=ends[1]) == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize("num_tokens", [1, 2, 5, 16, 17, 18])
@pytest.mark.parametrize("chosen", [True, False])
def test_few_tokens(num_tokens, chosen):
    """With no candidates, none of their mass is missed."""
    request = Request(num_tokens)
    request.is_chosen[:] = chosen
    assert request.mass() == (1.0 if num_tokens <= 17 else float(chosen))


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_all_and_none(scale):
    """Exactly 1 and exactly 0, whatever the logits."""
    request = Request(300, dtype=torch.float16)
    request.query *= scale
    request.is_chosen[:] = True
    assert request.mass(chunk=64) == 1.0
    request.is_chosen[5:-12] = False
    assert request.mass(chunk=64) == 0.0


def test_other_tokens_do_not_matter():
    """Neither their keys nor whether they are attended to."""
    request = Request(50)
    expected = request.mass()
    for outside in (slice(0, 5), slice(-12, None)):
        request.is_chosen[outside] = ~request.is_chosen[outside]
        request.keys[outside] = torch.nan
        assert request.mass() == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_huge_logits(dtype):
    """Logits near a million: the share stays a number between 0 and 1."""
    for seed in range(5):
        request = Request(60, heads=(8, 2), dtype=dtype, seed=seed)
        request.query *= 500
        request.keys *= 500
        found = request.mass(chunk=16)
        assert 0 <= found <= 1
        assert found == pytest.approx(request.naive_mass(), abs=1e-2)


def test_mass_far_below_the_rest_is_not_lost():
    """Candidates that hold 1e-40 of all mass still have shares among themselves."""
    request = Request(60)
    request.query[:] = 0
    request.query[:, 0] = 4.0
    request.keys[0, :, 0] = 100.0
    found, expected = request.mass(), request.naive_mass()
    assert found == pytest.approx(expected, rel=2e-5) and 0.01 < expected < 0.99


def test_double_stays_double():
    """Logits of 1e8 that differ by units: float32 would not tell them apart."""
    request = Request(50, dtype=torch.float64)
    request.query[:, 0] = 4e4
    request.keys[:, :, 0] = 1e4
    request.check(rel=1e-5)


def test_long_request():
    """More tokens than one chunk by default, most of them alike."""
    request = Request(40_000, heads=(2, 1), dtype=torch.float16)
    logits = request.keys[:, 0].double() @ request.query.double().T * request.scaling
    weights = logits.exp()
    chosen = request.is_chosen.double()[:, None]
    expected = float(((weights * chosen)[5:-12].sum(0) / weights[5:-12].sum(0)).mean())
    assert request.mass() == pytest.approx(expected, rel=1e-5)


def test_slots_of_either_type():
    request = Request(50)
    expected = request.mass()
    request.slots = request.slots.long()
    assert request.mass() == expected


def test_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="num_qo_heads: expected a multiple of num_kv_heads=2, got 3"):
        Request(50, heads=(3, 2)).mass()


def make_step(seq_lens: list[int], *, room: int = 0, window: Window = WINDOW, heads=(4, 2), **options) -> DecodeStep:
    """Requests that may grow by ``room`` tokens."""
    step = DecodeStep(PagedBatch([n + room for n in seq_lens], heads=heads), window, **options)
    step.batch.seq_lens.sub_(room)
    return step


def read_back(step: DecodeStep, row: int) -> list[int]:
    """Positions of one row as its entry tells them."""
    arguments = {"num_sink": step.window.num_sink, "num_local": step.window.num_local}
    slot, seq_len = int(step.batch.cache_slots[row]), int(step.batch.seq_lens[row])
    budget = int(step.batch.budgets[row])
    attended = attended_positions(step.cache, slot, seq_len, budget, **arguments)
    assert attended.shape == (seq_len,) and attended.dtype == torch.bool
    return attended.nonzero().flatten().tolist()


def check_read_back(step: DecodeStep) -> None:
    """Runs one step: what the entries tell is what was written."""
    for row, positions in enumerate(step.run()):
        if int(step.batch.budgets[row]) >= 0:
            assert read_back(step, row) == positions, row


@pytest.mark.parametrize("slots", [[0, 1, 2, 3], [3, 0, 5, 1]], ids=str)
def test_read_back_at_every_age(slots):
    """Rows that vote and rows that reuse, some of which vote again on the way, below, at and above the window."""
    step = make_step([300, 411, 55, 58], room=45, max_reuse=44, cache_slots=slots)
    for age in range(46):
        check_read_back(step)
        if age % 7 == 3:
            step.cache.seq_len[slots[1]] = 0
        step.batch.seq_lens.add_(1)
    hits, votes = step.cache.counters.tolist()
    assert hits > 120 and votes >= 10


def test_read_back_when_a_vote_gives_up_all_its_members():
    step = make_step([300], room=4, budgets=[4])
    for age in range(5):
        check_read_back(step)
        assert int(step.batch.seq_lens[0] - step.cache.seq_len[0]) == age
        step.batch.seq_lens.add_(1)


def test_read_back_of_smaller_budgets():
    """Cuts of a vote; votes of fewer members than those they replace, whose rest lies behind theirs; none at all."""
    step = make_step([300], room=9, max_budget=64)
    ages = []
    for budget in (64, 40, 64, 3, 2, 17, 16, 0, 0, 40):
        step.batch.budgets.fill_(budget)
        check_read_back(step)
        ages.append(int(step.batch.seq_lens[0] - step.cache.seq_len[0]))
        step.batch.seq_lens.add_(1)
    assert ages == [0, 1, 2, 3, 0, 0, 1, 0, 0, 0]


def test_read_back_of_no_budget_within_a_step():
    """The same length again, with nothing to choose: the cut of a vote to nothing."""
    step = make_step([300])
    check_read_back(step)
    step.batch.budgets.fill_(0)
    check_read_back(step)
    assert step.cache.counters.tolist() == [1, 1]


@pytest.mark.parametrize("window", [Window(0, 40, 0), Window(0, 1, 7), Window(9, 0, 7), Window(130, 40, 1)], ids=str)
def test_read_back_at_the_edges_of_the_window(window):
    step = make_step([500, 172], room=3, window=window, max_budget=64)
    for _ in range(4):
        check_read_back(step)
        step.batch.seq_lens.add_(1)


def test_read_back_of_ties():
    """All scores equal, then all but 20: the first candidates win, and the last of them go first."""
    step = make_step([300, 411], room=6, theta=-1.0)
    step.paged.query.zero_()
    for age in range(4):
        check_read_back(step)
        assert read_back(step, 0) == list(range(5 + 40 - age)) + list(range(300 - 12, 300 + age))
        step.batch.seq_lens.add_(1)
    step.cache.seq_len.zero_()
    pool, slots = step.paged.keys.pool, step.paged.slots
    pool[slots[:, 25:].long()] = pool[slots[0, 25].long()].clone()
    step.paged.query.copy_(torch.randn(step.paged.query.shape, generator=torch.Generator().manual_seed(1)))
    for _ in range(3):
        check_read_back(step)
        step.batch.seq_lens.add_(1)
    assert step.cache.counters.tolist() == [10, 4]
    assert ((step.cache.vote >> 32).diff() == 0).sum(1).min() > 10


@pytest.mark.parametrize("seed", range(3))
def test_read_back_on_a_walk(seed):
    """Queries that jump, budgets that come and go, entries that end."""
    generator = torch.Generator().manual_seed(seed)
    step = make_step([300, 40, 411], room=20, max_reuse=5, max_budget=64)
    for _ in range(20):
        step.batch.seq_lens.add_(1)
        jump = torch.randn(step.paged.query.shape, generator=generator).to(step.paged.query)
        step.paged.query.add_(jump * 2.0 ** float(torch.randint(-6, 2, (1,), generator=generator)))
        step.batch.budgets.copy_(torch.tensor([-1, 0, 9, 30, 40, 64])[torch.randint(0, 6, (3,), generator=generator)])
        step.cache.seq_len[int(torch.randint(0, 3, (1,), generator=generator))] *= int(jump.flatten()[0] < 1)
        check_read_back(step)
    assert min(step.cache.counters.tolist()) > 5


@pytest.mark.parametrize(("seq_len", "budget"), [(1, 40), (57, 40), (300, -1), (17, 0)])
def test_rows_that_attend_to_everything_need_no_entry(seq_len, budget):
    cache = make_step([300]).cache
    assert attended_positions(cache, 0, seq_len, budget, **ENDS).tolist() == [True] * seq_len


def test_entries_of_other_steps_stay_in_bounds():
    """Of a later step, too old for the budget, too small for it."""
    step = make_step([300], room=1, max_budget=64)
    kept = step.run()[0]
    for seq_len, budget in [(299, 40), (300, 41), (302, 43), (341, 40), (299, 30)]:
        assert attended_positions(step.cache, 0, seq_len, budget, **ENDS).shape == (seq_len,)
    too_few = attended_positions(step.cache, 0, 300, 43, **ENDS).nonzero().flatten().tolist()
    assert 5 not in kept and too_few == kept


@pytest.mark.parametrize("vote", [0, -1, 2**62, 2**63 - 1, -(2**63), (1 << 32) | (2**31 - 1)])
@pytest.mark.parametrize("vote_len", [0, 3, 40, 2**31 - 1, -5])
@pytest.mark.parametrize("vote_seq_len", [0, 1, 200, 300, 10**9, 2**31 - 1, -(2**31)])
def test_garbage_stays_in_bounds(vote, vote_len, vote_seq_len):
    cache = SelectionCache.create(3, 64, 40, torch.float16, DEVICE)
    cache.vote.fill_(vote)
    cache.vote_len.fill_(vote_len)
    cache.seq_len.fill_(vote_seq_len)
    for seq_len in (58, 300):
        attended = attended_positions(cache, 1, seq_len, 40, **ENDS)
        assert attended.shape == (seq_len,) and attended[:5].all()


@pytest.mark.parametrize("slot", [-1, 3])
def test_slots_of_nobody(slot):
    """-1 is a row without an entry: Python would take the last one."""
    cache = SelectionCache.create(3, 64, 40, torch.float16, DEVICE)
    with pytest.raises(ValueError, match=f"slot: expected 0 to 2, got {slot}"):
        attended_positions(cache, slot, 300, 40, **ENDS)


@contextlib.contextmanager
def no_sync():
    """A host that waits for the device raises: on a GPU; elsewhere tensors on `meta` have no values to wait for."""
    if not HAS_CUDA:
        yield "meta"
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield "cuda"
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_no_host_sync():
    device = "cuda" if HAS_CUDA else "meta"
    cache = SelectionCache.create(3, 64, 40, torch.float16, device)
    query, pool = torch.zeros(4, 16, device=device), torch.zeros(400, 2, 16, device=device)
    slots = torch.zeros(300, dtype=torch.int32, device=device)
    with no_sync():
        attended = attended_positions(cache, 1, 300, 40, **ENDS)
        options = {"scaling": 0.25, "logit_cap": 30.0, "chunk": 128}
        mass = candidate_mass(query, pool, slots, attended, **ENDS, **options)
        dense = attended_positions(cache, 1, 50, 40, **ENDS)
        few = candidate_mass(query, pool, slots[:10], dense[:10], **ENDS, **options)
    shapes = [tuple(tensor.shape) for tensor in (attended, mass, few)]
    assert shapes == [(300,), (), ()]
    assert {tensor.device.type for tensor in (attended, mass, dense, few)} == {device}


def make_probe(num_rows: int, size: int, *, wanted: int, dtype: torch.dtype = torch.float16) -> Probe:
    layer = torch.tensor([wanted], dtype=torch.int32, device=DEVICE)
    return Probe(layer, torch.full((num_rows, size), torch.nan, dtype=dtype, device=DEVICE))


def probed(seq_lens: list[int], *, wanted: int, spare: int = 2, heads=(4, 2), **options) -> DecodeStep:
    """A step with a poisoned probe of ``spare`` rows more than it needs."""
    probe = make_probe(len(seq_lens) + spare, heads[0] * 64, wanted=wanted)
    return make_step(seq_lens, heads=heads, probe=probe, **options)


@pytest.mark.parametrize("heads", [(4, 2), (6, 2), (7, 1)], ids=lambda h: f"{h[0]}q{h[1]}kv")
def test_the_wanted_layer_leaves_its_queries(heads):
    """Those of rows that vote, that fit their window, that reuse and that the caller writes; nothing behind them."""
    budgets = [40, 40, 40, -1, 0]
    step = probed([300, 30, 411, 222, 111], wanted=7, heads=heads, budgets=budgets)
    query, kept = step.paged.query, step.batch.probe.query
    for layer in (0, 6, 8, 1, 16, 71):
        step.layer = layer
        step.run()
        assert kept.isnan().all(), layer
    step.layer = 7
    step.run()
    assert step.cache.counters[0] > 0
    assert torch.equal(kept[:5], query.flatten(1)) and kept[5:].isnan().all()
    step.layer = 8
    query.neg_()
    step.run()
    assert torch.equal(kept[:5], -query.flatten(1)), "another layer wrote"


@pytest.mark.parametrize("wanted", range(3))
def test_one_of_many_layers(wanted):
    """As a server runs them, each with queries of its own; the last step that kept any is what is there."""
    step = probed([300, 411], wanted=wanted)
    queries = [torch.randn(step.paged.query.shape, device=DEVICE).to(step.paged.query) for _ in range(3)]
    for step.layer, query in enumerate(queries):
        step.paged.query.copy_(query)
        step.run()
    kept = step.batch.probe.query
    assert torch.equal(kept[:2], queries[wanted].flatten(1))
    step.batch.probe.layer.fill_(-1)
    before = kept.clone()
    for step.layer, query in enumerate(queries):
        step.paged.query.copy_(2 * query)
        step.run()
    assert torch.equal(kept[:2], before[:2])


def test_minus_one_wants_no_layer():
    step = probed([300, 30], wanted=-1)
    for step.layer in range(4):
        step.run()
    assert step.batch.probe.query.isnan().all()


def test_queries_with_room_between_them():
    """Queries are columns of a wider projection; the rows of the probe are not."""
    step = probed([300, 411, 58], wanted=0)
    wide = torch.full((3, 4 * 64 + 96), torch.nan, dtype=torch.float16, device=DEVICE)
    wide[:, : 4 * 64] = step.paged.query.flatten(1)
    step.paged.query = wide[:, : 4 * 64].view(3, 4, 64)
    step.run()
    assert torch.equal(step.batch.probe.query[:3], wide[:, : 4 * 64])


def state_after(wanted: int | None) -> dict[str, torch.Tensor]:
    """All that some steps leave, votes and hits among them; None: without a probe."""
    probe = None if wanted is None else make_probe(5, 256, wanted=wanted)
    step = make_step(
        [300, 30, 411, 222, 111], room=4, budgets=[40, 40, 17, -1, 0], theta=0.5, probe=probe, layer=2, max_reuse=3
    )
    found = {}
    for index in range(4):
        step.run()
        found[f"kv_indices {index}"] = step.kv_indices.clone()
        step.batch.seq_lens.add_(1)
        step.paged.query[index] *= -1
    assert min(step.cache.counters.tolist()) > 2
    return found | {name: tensor.clone() for name, tensor in (vars(step.cache) | vars(step.rows)).items()}


@pytest.mark.parametrize("wanted", [-1, 1, 2])
def test_a_probe_changes_nothing_else(wanted):
    without, found = state_after(None), state_after(wanted)
    assert without.keys() == found.keys()
    for name, tensor in without.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, equal_nan=True, msg=name)


def test_numbers_of_a_step_in_one_buffer():
    """theta, max_reuse and the wanted layer side by side: none but the first is aligned."""
    buffer = torch.full((8,), 10**6, dtype=torch.int32, device=DEVICE)
    theta, max_reuse, wanted = buffer[0:1].view(torch.float32), buffer[1:2], buffer[2:3]
    theta.fill_(0.9)
    max_reuse.fill_(3)
    wanted.fill_(4)
    step = make_step([300, 411], room=4, layer=5)
    kept = torch.full_like(step.paged.query.flatten(1), torch.nan)
    step.batch = replace(step.batch, theta=theta, max_reuse=max_reuse, probe=Probe(wanted, kept))
    for age in (0, 1, 2, 0):
        check_read_back(step)
        assert int(step.batch.seq_lens[0] - step.cache.seq_len[0]) == age
        assert kept.isnan().all()
        step.batch.seq_lens.add_(1)
    wanted.fill_(5)
    theta.fill_(1.5)
    check_read_back(step)
    assert torch.equal(kept, step.paged.query.flatten(1))
    assert step.cache.counters.tolist() == [4, 6]
    assert (buffer[3:] == 10**6).all()


def test_probes_that_do_not_fit():
    step = make_step([300, 411])
    layer, query = torch.zeros(1, dtype=torch.int32, device=DEVICE), step.paged.query.flatten(1).clone()
    cases = [
        (layer.long(), query, "probe.layer: expected dtype torch.int32"),
        (layer.expand(2), query, r"probe.layer: expected shape \[1\]"),
        (layer, query.float(), "probe.query: expected dtype torch.float16"),
        (layer, query[:, :64], r"probe.query: expected shape \['any', 256\]"),
        (layer, query[:1], "probe.query: expected 2 rows at least, got 1"),
        (layer, query.repeat(1, 2)[:, :256], "probe.query: expected contiguous rows"),
    ]
    step.plan()
    for layer, query, message in cases:
        step.batch = replace(step.batch, probe=Probe(layer, query))
        with pytest.raises(ValueError, match=message):
            step.launch()
    step.batch = replace(step.batch, probe=None)
    step.layer = -1
    with pytest.raises(ValueError, match="layer: expected 0 at least, got -1"):
        step.launch()
    assert step.cache.counters.tolist() == [0, 0]


def test_a_sample_from_end_to_end():
    """What was kept and read back gives the mass of the slots that were written, in steps that vote and that reuse."""
    scaling = 0.125
    step = probed([300, 411], room=9, wanted=3, layer=3, vote_scale=scaling)
    for age in range(10):
        rows = step.run()
        if age in (0, 1, 9):
            for row, positions in enumerate(rows):
                seq_len = int(step.batch.seq_lens[row])
                slots = step.paged.slots[row, :seq_len]
                attended = attended_positions(step.cache, row, seq_len, 40, **ENDS)
                query = step.batch.probe.query[row].view(4, 64)
                found = candidate_mass(query, step.paged.keys.pool, slots, attended, **ENDS, scaling=scaling)
                keys, is_chosen = step.paged.keys.pool[slots.long()].cpu(), [j in positions for j in range(seq_len)]
                expected = naive_mass(step.paged.query[row].cpu(), keys, is_chosen, **ENDS, scaling=scaling)
                assert found.item() == pytest.approx(expected, rel=1e-5)
                # 40 of 283 or 394 candidates, the best.
                assert 0.2 < expected < 0.6
        step.batch.seq_lens.add_(1)
    assert step.cache.counters.tolist() == [18, 2]


@NEEDS_CUDA
def test_a_graph_keeps_whichever_layer_is_wanted():
    """Captured with none wanted; the host says which before a replay."""
    step = probed([300, 30, 411], wanted=-1)
    queries = [torch.randn_like(step.paged.query) for _ in range(3)]

    def launch() -> None:
        for step.layer, query in enumerate(queries):
            step.paged.query.copy_(query)
            step.launch()

    step.run()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    kept = step.batch.probe.query
    for wanted in (-1, 2, 0, -1, 1):
        kept.fill_(torch.nan)
        step.batch.probe.layer.fill_(wanted)
        graph.replay()
        assert kept.isnan().all() if wanted < 0 else torch.equal(kept[:3], queries[wanted].flatten(1))
        assert kept[3:].isnan().all()


@NEEDS_CUDA
def test_no_layer_is_compiled_for():
    """Nor for where in a buffer the numbers of a step lie."""
    compiled = _begin_decode_kernel.device_caches[torch.cuda.current_device()][0]
    step = probed([300], wanted=-1)
    step.run()
    before = len(compiled)
    numbers = torch.full((8,), -1, dtype=torch.int32, device=DEVICE)
    for place in range(3):
        probe = replace(step.batch.probe, layer=numbers[place : place + 1])
        step.batch = replace(step.batch, probe=probe, max_reuse=numbers[place + 1 : place + 2])
        for step.layer in (0, 1, 2, 16, 64):
            step.run()
    assert len(compiled) == before
