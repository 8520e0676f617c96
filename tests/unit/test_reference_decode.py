# SPDX-License-Identifier: Apache-2.0
"""Decode selection, ranking, cache and positions of kernels/reference against naive float64 loops."""

from __future__ import annotations

import naive
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sglang_tokenselect.kernels.reference.attention import attend_positions
from sglang_tokenselect.kernels.reference.cache import CachedSelection
from sglang_tokenselect.kernels.reference.decode import select_for_query
from sglang_tokenselect.kernels.reference.kv import RequestKV
from sglang_tokenselect.kernels.reference.positions import Rope
from sglang_tokenselect.kernels.reference.vote import rank_candidates, soft_vote
from sglang_tokenselect.kernels.reference.window import Window

HEADS = [(1, 1), (4, 2), (6, 2), (7, 1)]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def paged_request(seq_len: int, num_kv_heads: int, head_dim: int, *, dtype=torch.float64, seed: int = 0) -> RequestKV:
    """A request whose slots are scattered in a pool that is NaN everywhere else."""
    generator = torch.Generator().manual_seed(seed)
    num_slots = 2 * seq_len + 3
    slots = torch.randperm(num_slots, generator=generator)[:seq_len].to(torch.int32)
    pools = torch.full((2, num_slots, num_kv_heads, head_dim), torch.nan, dtype=dtype)
    pools[:, slots.long()] = torch.randn(2, seq_len, num_kv_heads, head_dim, generator=generator).to(dtype)
    return RequestKV(pools[0], pools[1], slots)


@pytest.mark.parametrize(("num_qo_heads", "num_kv_heads"), HEADS)
@pytest.mark.parametrize("vote_heads", ["group", "modulo"])
def test_vote_is_the_sum_of_softmaxes(num_qo_heads, num_kv_heads, vote_heads):
    torch.manual_seed(1)
    query = torch.randn(3, num_qo_heads, 16, dtype=torch.float64)
    keys = torch.randn(63, num_kv_heads, 16, dtype=torch.float64)
    votes = soft_vote(query, keys, vote_scale=0.7, vote_heads=vote_heads)
    for row in range(3):
        expected = naive.score(query[row], keys, 0.7, modulo=vote_heads == "modulo")
        torch.testing.assert_close(votes[row], torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(votes.sum(-1), torch.full((3,), float(num_qo_heads), dtype=torch.float64))


def test_vote_pairs_heads_as_the_attention_does():
    """With distinct heads, "group" and "modulo" choose different tokens, so a mix-up cannot hide."""
    keys = torch.zeros(4, 2, 4)
    keys[1, 0, 0] = keys[2, 1, 0] = 50.0
    query = torch.zeros(1, 4, 4)
    query[0, 1, 0] = 1.0  # head 1 belongs to KV head 0 by group, to KV head 1 by modulo
    assert soft_vote(query, keys, vote_heads="group").argmax() == 1
    assert soft_vote(query, keys, vote_heads="modulo").argmax() == 2


def test_vote_refuses_heads_that_do_not_divide():
    with pytest.raises(ValueError, match="num_qo_heads: expected a multiple of num_kv_heads=2, got 3"):
        soft_vote(torch.zeros(1, 3, 4), torch.zeros(5, 2, 4))


@settings(deadline=None, max_examples=200)
@given(scores=st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=1, max_size=80), data=st.data())
def test_ranking_gives_ties_to_the_lower_position(scores, data):
    budget = data.draw(st.integers(0, len(scores)))
    assert rank_candidates(torch.tensor(scores), budget).tolist() == naive.ranking(scores, budget)


@pytest.mark.parametrize("extra", [1, 2, 100], ids=lambda x: f"window+{x}")
@pytest.mark.parametrize(("num_qo_heads", "num_kv_heads"), HEADS)
@pytest.mark.parametrize("compact", [False, True], ids=["absolute", "compact"])
def test_decode_selection_and_attention(extra, num_qo_heads, num_kv_heads, compact):
    window, theta = Window(num_sink=3, budget=11, num_local=5), 100.0
    n = window.size + extra
    kv = paged_request(n, num_kv_heads, 16, seed=extra)
    query = torch.randn(num_qo_heads, 16, dtype=torch.float64)
    rope = Rope.from_theta(theta, 16, 512, dtype=torch.float64) if compact else None

    ranked = select_for_query(query, kv, window, rope=rope)
    scored = naive.rotate(query, window.num_local, theta) if compact else query
    keys, values = kv.keys(slice(None)), kv.values(slice(None))
    candidates = keys[window.num_sink : n - window.num_local]
    assert (ranked - window.num_sink).tolist() == naive.ranking(naive.score(scored, candidates), window.budget)

    positions = window.positions(ranked, n)
    assert positions.tolist() == sorted({*range(3), *ranked.tolist(), *range(n - 5, n)})
    out = attend_positions(query.unsqueeze(0), kv, positions, scaling=0.3, rope=rope)[0]
    keys, values = keys[positions], values[positions]
    if compact:
        keys = torch.stack([naive.rotate(key, i, theta) for i, key in enumerate(keys)])
        query = naive.rotate(query, window.size - 1, theta)
    torch.testing.assert_close(out, naive.attend(query, keys, values, 0.3))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_selection_in_low_precision_is_the_exact_one_of_the_rounded_inputs(dtype):
    """Accumulation in float32 at least: members may differ only where scores tie within rounding."""
    window = Window(num_sink=2, budget=20, num_local=4)
    kv = paged_request(200, 2, 64, dtype=dtype)
    query = torch.randn(4, 64, generator=torch.Generator().manual_seed(5)).to(dtype)
    ranked = select_for_query(query, kv, window, vote_scale=0.125)
    exact = torch.tensor(naive.score(query, kv.keys(slice(2, 196)), 0.125), dtype=torch.float64)
    lowest = exact.sort(descending=True).values[window.budget - 1]
    assert len(set(ranked.tolist())) == window.budget
    assert exact[ranked - 2].min() >= lowest * (1 - 1e-4)


def test_selection_refuses_a_request_that_fits_the_window():
    window = Window(num_sink=3, budget=11, num_local=5)
    with pytest.raises(ValueError, match="seq_len: expected more than the window of 19 tokens, got 19"):
        select_for_query(torch.zeros(2, 16), paged_request(19, 1, 16), window)


@pytest.mark.parametrize("length", [1, 2, 63, 600])
@pytest.mark.parametrize("cap", [0.0, 5.0], ids=["plain", "soft-cap"])
def test_causal_attention_over_all_positions(length, cap):
    """Lengths 1 and 2, and 600 queries: more than one tile of queries."""
    kv = paged_request(length + 7, 2, 8)
    query = torch.randn(length, 4, 8, dtype=torch.float64)
    out = attend_positions(query, kv, slice(0, length + 7), scaling=0.4, logit_cap=cap)
    for row in {0, length // 2, length - 1}:
        end = 8 + row
        expected = naive.attend(query[row], kv.keys(slice(0, end)), kv.values(slice(0, end)), 0.4, cap)
        torch.testing.assert_close(out[row], expected)


def test_compact_equals_absolute_while_everything_is_attended():
    """With n <= t the compact positions are the model's own."""
    kv = paged_request(40, 2, 16)
    rope = Rope.from_theta(10000.0, 16, 64, dtype=torch.float64)
    query = torch.randn(6, 4, 16, dtype=torch.float64)
    compact = attend_positions(query, kv, slice(0, 40), scaling=0.25, rope=rope)
    rotated = RequestKV(rope.rotate(kv.keys(slice(None)), torch.arange(40)), kv.values(slice(None)), torch.arange(40))
    absolute = attend_positions(rope.rotate(query, torch.arange(34, 40)), rotated, slice(0, 40), scaling=0.25)
    torch.testing.assert_close(compact, absolute)


@pytest.mark.parametrize("rotary_dim", [16, 8], ids=["full", "partial"])
@pytest.mark.parametrize("neox", [True, False], ids=["halves", "pairs"])
def test_rotation(neox, rotary_dim):
    x = torch.randn(5, 3, 16, dtype=torch.float64)
    table = Rope.from_theta(50.0, rotary_dim, 32, dtype=torch.float64)
    positions = torch.tensor([0, 3, 31, 3, 8])
    turned = Rope(table.cos_sin_cache, is_neox_style=neox).rotate(x, positions)
    half = rotary_dim // 2
    order = [*range(half), *range(half, rotary_dim)] if neox else [*range(0, rotary_dim, 2), *range(1, rotary_dim, 2)]
    for row, position in enumerate(positions.tolist()):
        expected = naive.rotate(x[row][:, order], position, 50.0)
        torch.testing.assert_close(turned[row][:, order], expected)
    assert torch.equal(turned[..., rotary_dim:], x[..., rotary_dim:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rotation_of_half_precision_is_rounded_once(dtype):
    """A table in the dtype of the queries would be off by as much as the result's own rounding."""
    x = torch.randn(3, 4, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    positions = torch.tensor([1, 4095, 131_071])
    turned = Rope.from_theta(1e6, 64, 131_072).rotate(x, positions)
    assert turned.dtype == dtype
    for row, position in enumerate(positions.tolist()):
        exact = naive.rotate(x[row], position, 1e6)
        error = (turned[row].double() - exact).abs()
        assert (error <= 0.5 * torch.finfo(dtype).eps * exact.abs() + 1e-6).all()


def test_a_rope_knows_its_base():
    assert Rope.from_theta(50.0, 16, 32).theta == 50.0


@pytest.mark.parametrize(
    ("min_len", "lengths"),
    [
        (0, {1: 1, 10: 10, 11: 10, 100: 10}),
        (7, {1: 1, 10: 10, 11: 10, 100: 10}),
        (64, {1: 1, 11: 11, 64: 64, 65: 10}),
    ],
)
def test_attended_length(min_len, lengths):
    """A request that fits the window, or is no longer than min_len, attends to everything."""
    window = Window(num_sink=2, budget=5, num_local=3, min_len=min_len)
    assert {n: window.attended_length(n) for n in lengths} == lengths
    assert window.size == 10 and window.dense_len == max(10, min_len)


def test_num_candidates():
    """None up to the length that is attended to as a whole, and none without a budget."""
    counts = {1: 0, 60: 0, 100: 0, 101: 50, 1000: 949}
    window = Window(num_sink=20, budget=9, num_local=31, min_len=100)
    assert {n: window.num_candidates(n) for n in counts} == counts
    assert Window(num_sink=20, budget=0, num_local=31).num_candidates(1000) == 0
    assert Window(num_sink=20, budget=9, num_local=31).num_candidates(61) == 10


class TestCache:
    window = Window(num_sink=2, budget=6, num_local=3)
    query = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    entry = CachedSelection(query, torch.tensor([9, 4, 20, 7, 11, 15]), seq_len=40)

    def serves(self, query=None, seq_len=41, theta=0.9, max_reuse=64):
        query = self.query if query is None else query
        return self.entry.serves(query, seq_len, self.window, theta=theta, max_reuse=max_reuse)

    def test_same_query_is_served_until_max_reuse(self):
        assert self.serves(seq_len=42, max_reuse=3)
        assert not self.serves(seq_len=43, max_reuse=3)
        assert not self.serves(max_reuse=1)

    def test_cosine_is_taken_over_all_heads(self):
        turned = torch.tensor([[0.8, 0.6], [0.0, 1.0]])  # cosine 0.9 over both heads, 0.8 in one
        assert self.serves(turned, theta=0.899)
        assert not self.serves(turned, theta=0.901)
        assert not self.serves(theta=1.0001)

    def test_an_age_beyond_the_budget_is_not_served(self):
        assert self.serves(seq_len=46)
        assert not self.serves(seq_len=47)

    def test_a_shorter_request_is_not_served(self):
        """Another request on the same row could be shorter than the one that voted."""
        assert not self.serves(seq_len=39)

    @pytest.mark.parametrize("age", range(7))
    def test_no_token_is_in_neither_part(self, age):
        """The local window grows by what the vote has not seen; the length stays."""
        positions = self.window.positions(self.entry.ranked, 40 + age, age=age).tolist()
        kept = self.entry.ranked[: 6 - age].tolist()
        assert positions == sorted([0, 1, *kept, *range(37, 40 + age)])
        assert len(positions) == self.window.size
