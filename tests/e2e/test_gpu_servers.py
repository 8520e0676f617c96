# SPDX-License-Identifier: Apache-2.0
"""The exactness laws on a GPU, on real servers under mixed traffic, in CUDA graphs and without.

In bfloat16 the dense backend itself turns close greedy tokens with the batch that a request is in. So what differs is
counted beside what differs between two runs of the dense backend on the same requests, alone and crowded.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from accelerator import NEEDS_CUDA
from models import write_model
from traffic import (
    COMPACT,
    GPU_TOKEN_SERVER,
    RETRACT,
    SPARSE,
    TIGHT,
    WHOLE,
    Aborts,
    generate,
    mixed_requests,
    unshared_requests,
)

from bench.needle.serve import answer, samples_of
from sglang_tokenselect.demo_questions import token_counter
from sglang_tokenselect.needle import checkpoint_path
from sglang_tokenselect.needle_server import needle_server
from sglang_tokenselect.server_process import ServerProcess

pytestmark = NEEDS_CUDA

# Two ways not to reuse a selection.
ALONE = ("--tokenselect-max-reuse", "1", "--disable-cuda-graph")
CROWDED = ("--tokenselect-theta", "1.1")
REQUESTS = mixed_requests(200, longest=900, seed=1)
ALLOWED = 0.03
"""Share of requests that may differ beyond what the dense backend differs from itself."""
ALLOWED_COMPACT = 0.06
"""As FlashInfer rotates keys that are rounded already, and rounds them again; its tiles vary with the batch."""


UNSHARED = unshared_requests(60)


def differing(answers: list[list[int]], others: list[list[int]]) -> float:
    """Share of requests whose tokens are not all the same."""
    return sum(a != b for a, b in zip(answers, others, strict=True)) / len(answers)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("llama"), "Llama")


@pytest.fixture(scope="module")
def dense(llama):
    """Answers of the dense backend, and how much it differs from itself: on REQUESTS, and on UNSHARED."""
    with ServerProcess(llama, *GPU_TOKEN_SERVER, "--chunked-prefill-size", "512", backend="flashinfer") as server:
        alone = [generate(server, requests, concurrency=1) for requests in (REQUESTS, UNSHARED)]
    with ServerProcess(llama, *GPU_TOKEN_SERVER, *TIGHT, backend="flashinfer", env=RETRACT) as server:
        crowded = [generate(server, requests, concurrency=16) for requests in (REQUESTS, UNSHARED)]
    noise = [differing(*answers) for answers in zip(alone, crowded, strict=True)]
    return alone[0], *noise


@pytest.mark.parametrize("positions", [(), COMPACT], ids=["absolute", "compact"])
def test_200_mixed_requests_equal_dense(llama, dense, positions):
    answers, noise, _ = dense
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


def test_neighbours_chunks_graphs_and_the_way_not_to_reuse_change_nothing(llama, dense):
    _, _, noise = dense
    flags = (*GPU_TOKEN_SERVER, *SPARSE)
    with ServerProcess(llama, *flags, "--chunked-prefill-size", "512", *ALONE) as server:
        expected, counters_alone = generate(server, UNSHARED, concurrency=1), server.counters()
    with ServerProcess(llama, *flags, "--chunked-prefill-size", "96", *CROWDED) as server:
        answers, counters = generate(server, UNSHARED, concurrency=16), server.counters()
        log = server.log_path.read_text()
    different = differing(answers, expected)
    print(f"{different:.3f} differ, dense from itself {noise:.3f}")
    assert different <= noise + ALLOWED
    assert re.search(r"#running-req: ([2-9]|1\d)", log), "the requests did not run side by side"
    assert re.search(r"cuda graph: True", log)
    assert counters_alone["votes"] > 0 and counters_alone["block_votes"] > 0
    assert counters["votes"] > 0 and counters["reuses"] == counters_alone["reuses"] == 0


def test_nor_do_they_change_answers_about_long_texts():
    """In compact positions and with a model that was trained: with random weights, the members at the margin of a
    selection would weigh as much as others there, and rounding would turn many answers."""
    samples = [sample for seed in range(3) for sample in samples_of(8192, seed, token_counter(checkpoint_path()))]

    def answers(*flags: str, concurrency: int) -> list[list[str]]:
        with needle_server(False, *flags, device="cuda") as server, ThreadPoolExecutor(concurrency) as pool:
            texts = list(pool.map(lambda sample: answer(server, sample), samples))
            assert server.counters()["votes"] > 0 and server.counters()["reuses"] == 0
        # The numbers of one name are equally near to the question, so rounding decides which comes first.
        return [sorted(text.strip().split(", ")) for text in texts]

    alone = answers("--chunked-prefill-size", "4096", *ALONE, concurrency=1)
    crowded = answers("--chunked-prefill-size", "512", *CROWDED, concurrency=16)
    assert alone == crowded


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
