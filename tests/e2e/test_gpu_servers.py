# SPDX-License-Identifier: Apache-2.0
"""The exactness laws on a GPU, on real servers under mixed traffic, in CUDA graphs and without.

In bfloat16 the dense backend itself turns close greedy tokens with the batch that a request is in. So what differs is
counted beside what differs between two runs of the dense backend on the same requests, alone and crowded.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import NamedTuple

import pytest
from accelerator import NEEDS_CUDA
from models import write_model
from traffic import (
    AT_ONCE,
    COMPACT,
    GPU_TOKEN_SERVER,
    RETRACT,
    SPARSE,
    TIGHT,
    WHOLE,
    Aborts,
    answer_alone,
    answer_at_once,
    answer_texts,
    counted,
    fork,
    fork_of_forks,
    generate,
    mixed_requests,
    unshared_requests,
)

from bench.needle.serve import samples_of
from sglang_tokenselect.demo_questions import token_counter
from sglang_tokenselect.needle import checkpoint_path, tasks
from sglang_tokenselect.needle_server import needle_server
from sglang_tokenselect.server_process import ServerProcess

pytestmark = NEEDS_CUDA

# Two ways not to reuse a selection.
ALONE = ("--tokenselect-max-reuse", "1", "--disable-cuda-graph")
CROWDED = ("--tokenselect-theta", "1.1", "--decode-log-interval", "1")
REQUESTS = mixed_requests(200, longest=900, seed=1)
ALLOWED = 0.03
"""Share of requests that may differ beyond what the dense backend differs from itself."""
ALLOWED_COMPACT = 0.06
"""As FlashInfer rotates keys that are rounded already, and rounds them again; its tiles vary with the batch."""

UNSHARED = unshared_requests(60)
DENSE = {"dense": True}
HALF = {"budget": 24}
FULL = {"budget": 48}
"""The budget of SPARSE."""
POSITIONS = [pytest.param((), id="absolute"), pytest.param(COMPACT, id="compact")]


def differing(answers: list[list[int]], others: list[list[int]]) -> float:
    """Share of requests whose tokens are not all the same."""
    return sum(a != b for a, b in zip(answers, others, strict=True)) / len(answers)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("llama"), "Llama")


class Dense(NamedTuple):
    """Answers of the dense backend to requests alone, and how much it differs from itself when they are crowded."""

    answers: list[list[int]]
    noise: float


@pytest.fixture(scope="module")
def dense(llama):
    """On REQUESTS, and on UNSHARED."""
    with ServerProcess(llama, *GPU_TOKEN_SERVER, "--chunked-prefill-size", "512", backend="flashinfer") as server:
        alone = [generate(server, requests, concurrency=1) for requests in (REQUESTS, UNSHARED)]
    with ServerProcess(llama, *GPU_TOKEN_SERVER, *TIGHT, backend="flashinfer", env=RETRACT) as server:
        crowded = [generate(server, requests, concurrency=16) for requests in (REQUESTS, UNSHARED)]
    return [Dense(answers, differing(answers, others)) for answers, others in zip(alone, crowded, strict=True)]


@pytest.mark.parametrize("positions", POSITIONS)
def test_200_mixed_requests_equal_dense(llama, dense, positions):
    answers, noise = dense[0]
    with ServerProcess(llama, *GPU_TOKEN_SERVER, *WHOLE, *TIGHT, *positions, env=RETRACT) as server:
        with Aborts(server, REQUESTS[:12]) as aborts:
            ours = generate(server, REQUESTS, concurrency=24)
        log, counters = server.log_path.read_text(), server.counters()
    different = differing(ours, answers)
    print(f"{positions}: {different:.3f} differ from dense, dense from itself {noise:.3f}")
    assert different <= noise + (ALLOWED_COMPACT if positions else ALLOWED)
    assert counters["votes"] == counters["block_votes"] == 0
    assert aborts.count > 0
    assert re.search(r"#retracted_reqs: [1-9]", log)
    assert re.search(r"#cached-token: [1-9]", log)


def with_options(requests, options):
    return [replace(request, options=options) for request in requests]


class Alone(NamedTuple):
    """Answers to UNSHARED, alone and without graphs, of a server that was started with the budget of HALF."""

    half: list[list[int]]
    full: list[list[int]]
    counters: dict[str, int]


@pytest.fixture(scope="module")
def alone(llama):
    budgets = ("--tokenselect-budget", str(HALF["budget"]), "--tokenselect-max-budget", str(FULL["budget"]))
    with ServerProcess(llama, *GPU_TOKEN_SERVER, *SPARSE, *budgets, "--chunked-prefill-size", "512", *ALONE) as server:
        half = generate(server, UNSHARED, concurrency=1)
        full = generate(server, with_options(UNSHARED, FULL), concurrency=1)
        return Alone(half, full, server.counters())


@pytest.fixture(scope="module")
def crowded_server(llama, request):
    """For its parameter see POSITIONS. Its graphs have room for requests that attend to everything."""
    flags = ("--chunked-prefill-size", "96", "--cuda-graph-max-bs-decode", "64", *CROWDED, *request.param)
    with ServerProcess(llama, *GPU_TOKEN_SERVER, *SPARSE, *flags) as server:
        yield server


@pytest.mark.parametrize("crowded_server", POSITIONS[:1], indirect=True)
def test_neighbours_chunks_graphs_and_the_way_not_to_reuse_change_nothing(crowded_server, alone, dense):
    noise = dense[1].noise
    answers, counters = counted(crowded_server, lambda: generate(crowded_server, UNSHARED, concurrency=16))
    log = crowded_server.log_path.read_text()
    different = differing(answers, alone.full)
    print(f"{different:.3f} differ, dense from itself {noise:.3f}")
    assert different <= noise + ALLOWED
    assert re.search(r"#running-req: ([2-9]|1\d)", log), "the requests did not run side by side"
    assert re.search(r"cuda graph: True", log)
    assert alone.counters["votes"] > 0 and alone.counters["block_votes"] > 0
    assert counters["votes"] > 0 and counters["reuses"] == alone.counters["reuses"] == 0


@pytest.mark.parametrize("crowded_server", POSITIONS, indirect=True)
def test_options_are_honoured(crowded_server):
    """To the token, as the counters tell; those of a kind run one after the other."""
    requests = [request for request in UNSHARED if len(request.input_ids) > 200][:8]
    for options, attended in ((HALF, 16 + 24 + 32), (FULL, 16 + 48 + 32), (DENSE, None)):
        crowded_server.flush()
        asked = with_options(requests, options)
        _, counters = counted(crowded_server, lambda asked=asked: generate(crowded_server, asked, concurrency=1))
        queries = counters["decode_queries"]
        assert queries >= sum(request.max_new_tokens - 1 for request in requests)
        assert counters["attended_tokens"] == (queries * attended if attended else counters["cached_tokens"])
        assert counters["dense_queries"] == (0 if attended else queries)
        assert (counters["votes"] > 0) == (counters["block_votes"] > 0) == (attended is not None)


@pytest.mark.parametrize("crowded_server", POSITIONS, indirect=True)
def test_options_get_what_a_server_of_that_kind_answers(crowded_server, alone, dense):
    """Dense ones alone and in a crowd; budgets in compact positions below, with a model that was trained."""
    is_compact = "compact" in crowded_server.command
    kinds = (DENSE, HALF, None)
    crowded_server.flush()
    dense_alone = generate(crowded_server, with_options(UNSHARED, DENSE), concurrency=1)
    crowded_server.flush()
    begin = len(crowded_server.log_path.read_text())
    crowd = [asked for plain in UNSHARED for asked in (replace(plain, options=options) for options in kinds)]
    answers, counters = counted(crowded_server, lambda: generate(crowded_server, crowd, concurrency=16))
    pairs = {"dense, alone": (dense_alone, dense[1].answers), "dense": (answers[0::3], dense[1].answers)}
    if not is_compact:
        pairs |= {"half": (answers[1::3], alone.half), "full": (answers[2::3], alone.full)}
    different = {name: differing(*pair) for name, pair in pairs.items()}
    print(f"{different} differ, dense from itself {dense[1].noise:.3f}")
    assert max(different.values()) <= dense[1].noise + (ALLOWED_COMPACT if is_compact else ALLOWED)
    assert min(differing(answers[0::3], answers[1::3]), differing(answers[1::3], answers[2::3])) > 0.3
    assert sum(plain.max_new_tokens - 1 for plain in UNSHARED) <= counters["dense_queries"]
    assert counters["dense_queries"] < counters["decode_queries"] / 2
    assert graph_share(crowded_server.log_path.read_text()[begin:]) > 0.5


def graph_share(log: str) -> float:
    """Share of the decode steps with several requests that replayed a graph."""
    steps = re.findall(r"Decode batch, #running-req: (?:[2-9]|1\d),.* cuda graph: (True|False)", log)
    return steps.count("True") / len(steps)


COUNT_TOKENS = token_counter(checkpoint_path())
SAMPLES = [sample for seed in range(3) for sample in samples_of(8192, seed, COUNT_TOKENS)]
SMALLER = {"budget": 224}
"""Of 448 of the needle server."""


@pytest.fixture(scope="module")
def single_needles():
    """Without graphs, reuse, and scores of several requests at a time."""
    flags = (*ALONE, "--chunked-prefill-size", "4096", "--tokenselect-min-group", "0")
    with needle_server(False, *AT_ONCE, *flags, device="cuda") as server:
        yield server


@pytest.fixture(scope="module")
def needles(request):
    with needle_server(False, *AT_ONCE, *request.param, device="cuda") as server:
        yield server


NEEDLES = {
    "compact": ("--chunked-prefill-size", "512", *CROWDED),
    "absolute": ("--tokenselect-positions", "absolute", "--tokenselect-min-len", "0", "--tokenselect-min-shared", "0"),
}


def ask_samples(server, kinds, concurrency):
    """Answers to SAMPLES by kind of options; the numbers of one name are equally near to the question, so rounding
    decides which comes first."""

    def ask(asked):
        sample, options = asked
        [text] = answer_texts(server, [sample.prompt], options=options)
        return sorted(text.strip().split(", "))

    with ThreadPoolExecutor(concurrency) as pool:
        answers = list(pool.map(ask, [(sample, options) for sample in SAMPLES for options in kinds]))
    return [answers[i :: len(kinds)] for i in range(len(kinds))]


def mean_score(answers):
    scores = [tasks.score(", ".join(answer), sample.answers) for answer, sample in zip(answers, SAMPLES, strict=True)]
    return sum(scores) / len(scores)


@pytest.mark.parametrize("needles", [NEEDLES["compact"]], ids=["compact"], indirect=True)
def test_nor_do_they_change_answers_about_long_texts(single_needles, needles):
    """In compact positions and with a model that was trained: with random weights, the members at the margin of a
    selection would weigh as much as others there, and rounding would turn many answers. Beyond the trained length,
    dense attention is lost on purpose: it shows that a request for it was followed."""
    [full], _ = counted(single_needles, lambda: ask_samples(single_needles, (None,), concurrency=1))
    [smaller], counters_smaller = counted(single_needles, lambda: ask_samples(single_needles, (SMALLER,), 1))
    kinds = (None, SMALLER, DENSE)
    crowded, counters = counted(needles, lambda: ask_samples(needles, kinds, concurrency=16))
    assert crowded[:2] == [full, smaller]
    assert mean_score(smaller) >= 0.95
    assert mean_score(crowded[2]) <= 0.25
    assert counters_smaller["attended_tokens"] == counters_smaller["decode_queries"] * (64 + 224 + 128)
    assert counters_smaller["votes"] > 0 and counters["votes"] > 0
    assert counters_smaller["reuses"] == counters["reuses"] == counters_smaller["dense_queries"] == 0
    assert counters["dense_queries"] > 0


# In absolute positions the model is lost beyond 4,096 tokens.
BRANCHES = {
    "compact": (fork(16_000, 1, COUNT_TOKENS), fork_of_forks(24_000, 6_000, 1, COUNT_TOKENS)),
    "absolute": (fork(3_900, 1, COUNT_TOKENS), fork_of_forks(2_500, 1_300, 1, COUNT_TOKENS)),
}


@pytest.mark.parametrize(
    ("needles", "branches"),
    [
        pytest.param(NEEDLES[positions], branches, id=f"{positions}-{name}")
        for positions, pair in BRANCHES.items()
        for name, branches in zip(("fork", "fork of forks"), pair, strict=True)
    ],
    indirect=["needles"],
)
def test_branches_answer_at_once_as_each_alone(needles, branches):
    alone, counters_alone = counted(needles, lambda: answer_alone(needles, branches))
    at_once, counters = counted(needles, lambda: answer_at_once(needles, branches))
    assert all(branch.answer in answer for branch, answer in zip(branches, alone, strict=True)), alone
    assert at_once == alone
    assert counters_alone["shared_queries"] == counters["dense_queries"] == 0
    assert counters["shared_queries"] > 0


@pytest.mark.parametrize("branches", BRANCHES["compact"], ids=["fork", "fork of forks"])
def test_so_they_do_if_they_are_not_scored_together(single_needles, branches):
    at_once, counters = counted(single_needles, lambda: answer_at_once(single_needles, branches))
    assert all(branch.answer in answer for branch, answer in zip(branches, at_once, strict=True)), at_once
    assert counters["votes"] > counters["shared_queries"] == 0


@pytest.mark.parametrize("options", [SPARSE, WHOLE], ids=["sparse", "dense"])
def test_prefill_graphs_change_nothing(llama, options):
    """SGLang's prefill graphs break at the attention, which then runs as without them."""
    requests = UNSHARED[:40]
    flags = (*GPU_TOKEN_SERVER, *options, "--chunked-prefill-size", "128")
    graphs = ("--cuda-graph-backend-prefill", "breakable", "--cuda-graph-max-bs-prefill", "128")
    with ServerProcess(llama, *flags) as server:
        expected = generate(server, requests, concurrency=1)
    with ServerProcess(llama, *flags, *graphs) as server:
        answers, counters = generate(server, requests, concurrency=1), server.counters()
    different = differing(answers, expected)
    print(f"prefill graphs: {different:.3f} differ")
    assert different <= ALLOWED
    assert (counters["block_votes"] > 0) == (options is SPARSE)


MODELS = {
    "Mistral": {"sliding_window": None},
    "Qwen2": {},
    "Qwen3": {},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "Qwen2Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128},
    "Gemma2": {"head_dim": 128, "query_pre_attn_scalar": 128, "sliding_window": 32, "hidden_act": "gelu_pytorch_tanh"},
}
# SGLang's own FlashInfer backend is not exact for the models that dense_backend.py names.
DENSE_BACKENDS = {"Gemma2": "triton"}


@pytest.mark.parametrize("architecture", MODELS)
def test_models_answer_as_dense_and_select(architecture, tmp_path):
    """Short requests as dense; long ones select in the layers that have no sliding window."""
    model = write_model(tmp_path, architecture, **MODELS[architecture])
    requests = [request for request in REQUESTS if len(request.input_ids) <= 70][:30]
    with ServerProcess(model, *GPU_TOKEN_SERVER, backend=DENSE_BACKENDS.get(architecture, "flashinfer")) as server:
        expected = generate(server, requests, concurrency=1)
    with ServerProcess(model, *GPU_TOKEN_SERVER, *SPARSE) as server:
        answers = generate(server, requests, concurrency=1)
        before = server.counters()
        generate(server, UNSHARED[:24], concurrency=8)
        counters = server.counters()
    different = differing(answers, expected)
    print(f"{architecture}: {different:.3f} differ from dense, {counters}")
    assert different <= 0.1
    assert before["votes"] == before["block_votes"] == 0
    assert counters["votes"] > 0 and counters["block_votes"] > 0
