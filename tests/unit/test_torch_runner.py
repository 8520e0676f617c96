# SPDX-License-Identifier: Apache-2.0
"""The runner over whole requests: chunks, batches, the selection cache and its invalidation."""

from __future__ import annotations

import pytest
import torch
from torch_server import SCALING, Server, part, tokens

from sglang_tokenselect.kernels.reference.attention import attend_positions
from sglang_tokenselect.kernels.reference.kv import RequestKV


def dense(of, end):
    """Causal attention of all `end` queries over everything."""
    kv = RequestKV(of[1][:end], of[2][:end], torch.arange(end))
    return attend_positions(of[0][:end], kv, slice(None), scaling=SCALING)


@pytest.mark.parametrize("positions", ["absolute", "compact"])
@pytest.mark.parametrize("chunks", [(16,), (48,), (64, 16, 80)], ids=str)
def test_prefill_does_not_depend_on_chunks_of_whole_blocks(positions, chunks):
    prompt = tokens(151, seed=1)
    whole = Server(positions=positions).forward((0, 0, prompt))[0]
    server, start, out, i = Server(positions=positions), 0, [], 0
    while start < 151:
        end = min(151, start + chunks[i % len(chunks)])
        out += server.forward((0, start, part(prompt, start, end)))
        start, i = end, i + 1
    assert torch.equal(torch.cat(out), whole)


@pytest.mark.parametrize("positions", ["absolute", "compact"])
def test_a_request_does_not_see_its_neighbours(positions):
    """Law 3: prefill and decode in a mixed batch equal the request alone, bit for bit."""
    prompts = [tokens(n + 3, seed=n) for n in (100, 1, 37, 70)]
    lengths = [100, 1, 37, 70]
    together, alone = Server(positions=positions), Server(positions=positions)
    outs = together.forward(*[(row, 0, part(p, 0, n)) for row, (p, n) in enumerate(zip(prompts, lengths, strict=True))])
    for row, (prompt, n) in enumerate(zip(prompts, lengths, strict=True)):
        assert torch.equal(alone.forward((row, 0, part(prompt, 0, n)))[0], outs[row])
    for step in range(3):
        parts = [
            (row, n + step, part(p, n + step, n + step + 1))
            for row, (p, n) in enumerate(zip(prompts, lengths, strict=True))
        ]
        outs = together.forward(*parts, is_decode=True)
        for (row, start, new), out in zip(parts, outs, strict=True):
            assert torch.equal(alone.decode(row, start, new), out)


@pytest.mark.parametrize("positions", ["absolute", "compact"])
@pytest.mark.parametrize("prompt_len", [10, 40, 53])
@pytest.mark.parametrize("cached", [0, 10, 61])
def test_a_retracted_request_computes_what_it_had_generated_as_before(positions, prompt_len, cached):
    """From wherever the radix cache knows nothing; also where generating began within the window."""
    of, server, again = tokens(80, seed=4), *(Server(positions=positions, theta=2.0) for _ in range(2))
    first = server.forward((0, 0, part(of, 0, prompt_len)))
    first += [server.decode(0, n, part(of, n, n + 1)) for n in range(prompt_len, 80)]
    if cached:
        again.forward((0, 0, part(of, 0, cached)), prompt_len=prompt_len)
    out = again.forward((0, cached, part(of, cached, 80)), prompt_len=prompt_len)[0]
    torch.testing.assert_close(out[max(prompt_len - cached, 0) :], torch.cat(first)[max(prompt_len, cached) :])


def test_budget_beyond_the_context_is_dense():
    """Law 1, also one token below and at the window's size."""
    prompt = tokens(60, seed=3)
    server = Server(budget=48)  # window of 60 tokens
    out = torch.cat(server.forward((0, 0, part(prompt, 0, 55))))
    steps = [server.decode(0, n, part(prompt, n, n + 1)) for n in range(55, 60)]
    torch.testing.assert_close(torch.cat([out, *steps]), dense(prompt, 60))
    assert server.runner.counters.votes == server.runner.counters.block_votes == 0


def test_dense_layers_attend_to_everything():
    prompt = tokens(100, seed=4)
    server = Server(dense_layers=(0,))
    out = torch.cat(server.forward((0, 0, part(prompt, 0, 99))))
    out = torch.cat([out, server.decode(0, 99, part(prompt, 99, 100))])
    torch.testing.assert_close(out, dense(prompt, 100))


def test_selection_makes_a_difference():
    """The laws above would hold for a runner that never selects."""
    prompt = tokens(100, seed=4)
    out = Server().forward((0, 0, prompt))[0]
    torch.testing.assert_close(out[:32], dense(prompt, 32))
    assert not torch.allclose(out[48:], dense(prompt, 100)[48:], atol=1e-2)


def similar_steps(server, prompt, num_steps):
    """Decode steps whose queries are nearly equal, so that theta alone would reuse."""
    server.forward((0, 0, part(prompt, 0, 80)))
    outs = []
    for n in range(80, 80 + num_steps):
        query, key, value = part(prompt, n, n + 1)
        outs.append(server.decode(0, n, [prompt[0][80:81] + 0.01 * query, key, value]))
    return torch.cat(outs)


def test_never_reusing_by_theta_and_by_max_reuse_is_the_same():
    """Law 4."""
    prompt = tokens(100, seed=5)
    by_theta, by_age = Server(theta=1.1), Server(max_reuse=1)
    assert torch.equal(similar_steps(by_theta, prompt, 10), similar_steps(by_age, prompt, 10))
    for server in (by_theta, by_age):
        assert (server.runner.counters.votes, server.runner.counters.reuses) == (10, 0)


def test_reuse_ends_after_max_reuse_steps():
    server = Server(max_reuse=4)
    similar_steps(server, tokens(100, seed=5), 10)
    assert (server.runner.counters.votes, server.runner.counters.reuses) == (3, 7)


def test_reuse_attends_to_every_token_since_the_vote():
    """No blind spot: with max_reuse beyond the local window, all that came since the vote is attended."""
    prompt = tokens(100, seed=6)
    server = Server(max_reuse=64, budget=16)
    outs = similar_steps(server, prompt, 12)
    assert server.runner.counters.votes == 1
    [entry] = server.runner._cached[0].values()
    n = 92
    attended = server.runner.config.window.positions(entry.ranked, n, age=n - entry.seq_len).tolist()
    assert set(range(81 - 8, n)) <= set(attended)
    kv = RequestKV(server.pools[0], server.pools[1], server.req_to_token[0, :n])
    query = prompt[0][80:81] + 0.01 * prompt[0][n - 1 : n]
    torch.testing.assert_close(attend_positions(query, kv, torch.tensor(attended), scaling=SCALING)[0], outs[-1])


def test_a_new_prefill_ends_what_its_row_had_cached():
    """A reused row must never read the selection of the request before, even for an equal query."""
    first, second = tokens(90, seed=7), tokens(90, seed=8)
    second[0][80] = first[0][80]
    server, fresh = Server(), Server()
    server.forward((0, 0, part(first, 0, 80)))
    server.decode(0, 80, part(first, 80, 81))
    for each in (server, fresh):
        each.forward((0, 0, part(second, 0, 80)))
    assert torch.equal(server.decode(0, 80, part(second, 80, 81)), fresh.decode(0, 80, part(second, 80, 81)))


def test_slots_may_change_under_a_running_request():
    """The radix cache moves a running request to other slots: cached selections are positions."""
    prompt = tokens(90, seed=9)
    server, still = Server(), Server()
    for each in (server, still):
        each.forward((0, 0, part(prompt, 0, 80)))
        each.decode(0, 80, part(prompt, 80, 81))
    old, new = server.req_to_token[0, :81].long(), server.req_to_token[1, :81].long()
    server.pools[:, new] = server.pools[:, old]
    server.pools[:, old] = torch.nan
    server.req_to_token[0, :81] = new.int()
    step = [prompt[0][80:81], *part(prompt, 81, 82)[1:]]
    assert torch.equal(server.decode(0, 81, step), still.decode(0, 81, step))
    assert server.runner.counters.reuses == 1


def test_counters_tell_what_was_attended():
    server = Server()
    prompt = tokens(90, seed=10)
    server.forward((2, 0, part(prompt, 0, 80)), (1, 0, part(prompt, 0, 10)))
    server.forward((2, 80, part(prompt, 80, 81)), (1, 10, part(prompt, 10, 11)), is_decode=True)
    counters = server.runner.counters
    assert (counters.decode_queries, counters.cached_tokens, counters.attended_tokens) == (2, 81 + 11, 24 + 11)
    assert counters.block_votes == 3  # blocks at 32, 48 and 64
