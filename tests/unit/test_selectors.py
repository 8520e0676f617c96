# SPDX-License-Identifier: Apache-2.0
"""The policies of selection against naive float64 loops, and in a runner."""

from __future__ import annotations

import naive
import pytest
import torch

from sglang_tokenselect.config import ConfigError, TokenSelectConfig
from sglang_tokenselect.kernels.reference.vote import rank_candidates
from sglang_tokenselect.planner import ForwardPlan, RequestPlan
from sglang_tokenselect.runner import LayerInput
from sglang_tokenselect.selectors import SELECTORS
from sglang_tokenselect.selectors.page import PAGE_SIZE
from sglang_tokenselect.torch_runner import TorchRunner

HEADS = [(1, 1), (4, 2), (6, 2), (7, 1)]


def naive_pages(query: torch.Tensor, keys: torch.Tensor, vote_scale: float) -> list[float]:
    """query [H, d], keys [n, H_kv, d] to n scores: each head's softmax over bounds of pages, summed over heads."""
    pages = [keys[i : i + PAGE_SIZE] for i in range(0, len(keys), PAGE_SIZE)]
    group = query.shape[0] // keys.shape[1]
    total = [0.0] * len(pages)
    for head, q in enumerate(query.tolist()):
        bounds = []
        for page in pages:
            values = page[:, head // group].tolist()
            best = [max(x * key[i] for key in values) for i, x in enumerate(q)]
            bounds.append(vote_scale * sum(best))
        total = [t + share for t, share in zip(total, naive.softmax(bounds), strict=True)]
    return [total[j // PAGE_SIZE] for j in range(len(keys))]


@pytest.mark.parametrize("num_keys", [1, 2, 15, 16, 17, 63, 100])
@pytest.mark.parametrize(("num_qo_heads", "num_kv_heads"), HEADS)
def test_pages_have_the_votes_of_their_bounds(num_qo_heads, num_kv_heads, num_keys):
    generator = torch.Generator().manual_seed(num_keys)
    query = torch.randn(2, num_qo_heads, 8, dtype=torch.float64, generator=generator)
    keys = torch.randn(num_keys, num_kv_heads, 8, dtype=torch.float64, generator=generator)
    scores = SELECTORS["page"].score(query, keys, vote_scale=0.7)
    for row in range(2):
        expected = torch.tensor(naive_pages(query[row], keys, 0.7), dtype=torch.float64)
        torch.testing.assert_close(scores[row], expected)


def test_the_budget_is_filled_with_whole_pages_and_the_last_in_part():
    keys = torch.zeros(80, 1, 4)
    for page, size in enumerate((1.0, 5.0, 2.0, 4.0, 3.0)):
        keys[PAGE_SIZE * page + 7, 0, 0] = size
    query = torch.zeros(1, 1, 4)
    query[0, 0, 0] = 1.0
    ranked = rank_candidates(SELECTORS["page"].score(query, keys, vote_scale=1.0)[0], 40)
    assert ranked.tolist() == [*range(16, 32), *range(48, 64), *range(64, 72)]


def test_window_chooses_the_latest():
    query, keys = torch.randn(3, 4, 8), torch.randn(50, 2, 8)
    for scores in SELECTORS["window"].score(query, keys, vote_scale=1.0):
        assert rank_candidates(scores, 5).tolist() == [49, 48, 47, 46, 45]


def run(**options) -> tuple[list[torch.Tensor], TorchRunner]:
    """Attention of a prefill of 150 tokens and of two decode steps."""
    config = TokenSelectConfig(**{**SMALL, **options})
    generator = torch.Generator().manual_seed(5)
    pools = torch.randn(2, 200, 2, 16, dtype=torch.float64, generator=generator)
    queries = 3 * torch.randn(200, 4, 16, dtype=torch.float64, generator=generator)
    runner = TorchRunner(config, torch.arange(200).expand(2, -1), {})
    layer = LayerInput(0, pools[0], pools[1], scaling=0.25, logit_cap=0.0)
    outputs = []
    for start, end in ((0, 150), (150, 151), (151, 152)):
        runner.begin(ForwardPlan(end - start == 1, (RequestPlan(1, end, 0, end - start),)))
        outputs.append(runner.run(queries[start:end], layer))
    return outputs, runner


SMALL = {"sink": 4, "budget": 32, "local": 8, "block": 16, "sub_block": 4, "min_len": 0, "max_reuse": 1}


def test_mean_is_the_vote_of_one_mean_query_per_block():
    for actual, expected in zip(run(selector="mean")[0], run(sub_block=16)[0], strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert not torch.equal(run(selector="mean")[0][0], run()[0][0])


def test_window_in_a_runner_is_a_longer_local_window():
    """Positions of blocks and decode steps: sink and the last 40, as a budget of 0 has with a local window of 40."""
    for actual, expected in zip(run(selector="window")[0], run(budget=0, local=40)[0], strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("selector", SELECTORS)
def test_every_policy_attends_to_as_many_tokens(selector):
    outputs, runner = run(selector=selector)
    assert all(output.isfinite().all() for output in outputs)
    counters = runner.counters
    assert (counters.decode_queries, counters.attended_tokens) == (2, 2 * (4 + 32 + 8))


def test_policies_differ():
    decoded = [run(selector=selector)[0][1] for selector in ("vote", "page", "window")]
    assert not any(torch.equal(a, b) for a, b in ((decoded[0], decoded[1]), (decoded[1], decoded[2])))


def test_unknown_policies_are_refused():
    with pytest.raises(ConfigError, match="selector: expected one of vote, mean, page, window, got 'best'"):
        TokenSelectConfig(selector="best")
