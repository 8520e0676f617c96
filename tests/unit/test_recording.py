# SPDX-License-Identifier: Apache-2.0
"""Recordings of decode steps, and the measures in them, against naive float64 loops."""

from __future__ import annotations

import io
import math
import re
import urllib.error
from pathlib import Path
from types import SimpleNamespace

import naive
import numpy as np
import pytest
import torch
from accelerator import DEVICE
from attention_twins import DecodeTwin, PrefillTwin

from sglang_tokenselect import compat, refusals
from sglang_tokenselect.config import TokenSelectConfig
from sglang_tokenselect.fidelity.head_group import AttentionRule, largest_weights
from sglang_tokenselect.fidelity.measure import measure_fidelity
from sglang_tokenselect.kernels.reference.kv import RequestKV
from sglang_tokenselect.kernels.reference.positions import Rope
from sglang_tokenselect.planner import PADDING_ROW, ForwardPlan, RequestPlan
from sglang_tokenselect.recording import session
from sglang_tokenselect.recording.options import ServerOptions
from sglang_tokenselect.recording.recorder import BUDGETS, Recorder
from sglang_tokenselect.recording.recording import Recording, recording_paths
from sglang_tokenselect.runner import LayerInput
from sglang_tokenselect.server_process import ServerProcess
from sglang_tokenselect.torch_runner import TorchRunner

DIM, SINK, LOCAL, THETA, SCALING = 8, 3, 5, 1e4, 0.4


def paged_request(num_tokens: int, num_kv_heads: int = 2, *, dtype=torch.float64, seed: int = 0) -> RequestKV:
    """Slots are scattered in a pool that is NaN everywhere else."""
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randperm(2 * num_tokens + 3, generator=generator)[:num_tokens]
    pools = torch.full((2, 2 * num_tokens + 3, num_kv_heads, DIM), torch.nan, dtype=dtype)
    pools[:, slots] = torch.randn(2, num_tokens, num_kv_heads, DIM, generator=generator, dtype=torch.float64).to(dtype)
    return RequestKV(pools[0], pools[1], slots)


def draw_query(num_qo_heads: int, *, dtype=torch.float64, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.randn(num_qo_heads, DIM, generator=generator, dtype=torch.float64).to(dtype)


def rule_of(positions: str, logit_cap: float = 0.0, num_positions: int = 64) -> AttentionRule:
    rope = Rope.from_theta(THETA, DIM, num_positions, dtype=torch.float64) if positions == "compact" else None
    return AttentionRule(SCALING, logit_cap, rope)


def naive_logits(query, kv, head, positions, rule):
    """Of one head over some positions; compact positions are their places in the list."""
    keys = [kv.key_pool[kv.slots[position]].double() for position in positions]
    query, kv_head = query.double(), head // (query.shape[0] // kv.key_pool.shape[1])
    if rule.rope is not None:
        keys = [naive.rotate(key, place, THETA) for place, key in enumerate(keys)]
        query = naive.rotate(query, len(keys) - 1, THETA)
    logits = [rule.scaling * float(query[head] @ key[kv_head]) for key in keys]
    return [rule.logit_cap * math.tanh(x / rule.logit_cap) for x in logits] if rule.logit_cap else logits


def naive_output(query, kv, head, positions, rule):
    kv_head = head // (query.shape[0] // kv.key_pool.shape[1])
    shares = naive.softmax(naive_logits(query, kv, head, positions, rule))
    values = [kv.value_pool[kv.slots[position], kv_head].double() for position in positions]
    return sum(share * value for share, value in zip(shares, values, strict=True))


def naive_ranking(query, kv, rule, vote_scale):
    """All candidates, best first."""
    voter = query.double() if rule.rope is None else naive.rotate(query, LOCAL, THETA)
    candidates = range(SINK, len(kv) - LOCAL)
    scores = naive.score(voter, kv.keys(slice(SINK, len(kv) - LOCAL)), vote_scale)
    return [SINK + i for i in naive.ranking(scores, len(candidates))]


def naive_fidelity(query, kv, budget, rule, vote_scale=1.0):
    """mass, recall and error of each head."""
    n, num_candidates = len(kv), max(len(kv) - SINK - LOCAL, 0)
    chosen = set(naive_ranking(query, kv, rule, vote_scale)[:budget] if num_candidates else [])
    everything = budget >= num_candidates
    attended = range(n) if everything else sorted({*range(SINK), *chosen, *range(n - LOCAL, n)})
    rows = []
    for head in range(query.shape[0]):
        logits = naive_logits(query, kv, head, range(n), rule)
        shares = naive.softmax(logits)
        best = sorted(range(SINK, n - LOCAL), key=lambda j: (-logits[j], j))[:budget]  # noqa: B023
        recall = math.nan if budget == 0 else 1.0 if everything else len(chosen & set(best)) / budget
        dense = naive_output(query, kv, head, range(n), rule)
        sparse = naive_output(query, kv, head, attended, rule)
        rows.append((sum(shares[j] for j in attended), recall, float((sparse - dense).norm() / dense.norm())))
    return torch.tensor(rows, dtype=torch.float64)


def measured(query, kv, budgets, rule, vote_scale=1.0):
    """[num_budgets, num_qo_heads, 3]."""
    fidelity = measure_fidelity(query, kv, budgets, rule, num_sink=SINK, num_local=LOCAL, vote_scale=vote_scale)
    return torch.stack([fidelity.mass, fidelity.recall, fidelity.error], dim=-1)


@pytest.mark.parametrize("positions", ["absolute", "compact"])
@pytest.mark.parametrize("logit_cap", [0.0, 2.0])
@pytest.mark.parametrize("heads", [(4, 2), (6, 3), (3, 1)])
def test_measures_are_those_of_the_definition(positions, logit_cap, heads):
    rule, budgets = rule_of(positions, logit_cap), (0, 1, 7, 20, 29, 30, 31, 500)
    query, kv = draw_query(heads[0]), paged_request(38, heads[1])
    actual = measured(query, kv, budgets, rule, vote_scale=0.7)
    for row, budget in zip(actual, budgets, strict=True):
        torch.testing.assert_close(row, naive_fidelity(query, kv, budget, rule, 0.7), equal_nan=True)
    assert 0 < actual[2, :, 1].min() < 1, "a case in which heads and votes differ"


@pytest.mark.parametrize("num_tokens", [1, 7, 8, 9])
def test_requests_that_fit_the_window_lose_nothing(num_tokens):
    """Sink and local window are 8 tokens; the ninth is the only candidate."""
    actual = measured(draw_query(4), paged_request(num_tokens), (1, 4), rule_of("absolute"))
    torch.testing.assert_close(actual, torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64).expand(2, 4, 3))


def test_nothing_chosen_has_no_recall():
    actual = measured(draw_query(4), paged_request(8), (0,), rule_of("absolute"))
    assert actual[..., 1].isnan().all() and (actual[..., 0] == 1).all() and (actual[..., 2] == 0).all()


def test_ties_go_to_the_lower_position():
    """A query of zeros finds all candidates equal: both the vote and each head's best are the first."""
    query, kv = draw_query(4) * 0, paged_request(40)
    actual = measured(query, kv, (6, 12), rule_of("absolute"))
    torch.testing.assert_close(actual[..., 1], torch.ones(2, 4, dtype=torch.float64))
    torch.testing.assert_close(actual[..., 0], torch.tensor([[14 / 40], [20 / 40]], dtype=torch.float64).expand(2, 4))


@pytest.mark.parametrize("positions", ["absolute", "compact"])
def test_half_precision_is_widened(positions):
    query, kv = draw_query(4, dtype=torch.bfloat16), paged_request(38, dtype=torch.bfloat16)
    rule = rule_of(positions)
    actual = measured(query, kv, (7, 20), rule)
    assert actual.dtype == torch.float32
    for row, budget in zip(actual[..., ::2], (7, 20), strict=True):
        # In compact mode the query is rounded once it is rotated for the vote, which may turn a close member.
        expected = naive_fidelity(query, kv, budget, rule)[:, ::2].float()
        torch.testing.assert_close(row, expected, atol=2e-5 if positions == "absolute" else 0.02, rtol=0)


def test_weights_are_the_largest_of_any_head():
    for positions in ("absolute", "compact"):
        rule, query, kv = rule_of(positions, 3.0), draw_query(6), paged_request(30)
        attended = torch.tensor([0, 1, 4, 9, 20, 28, 29])
        shares = [naive.softmax(naive_logits(query, kv, head, attended.tolist(), rule)) for head in range(6)]
        expected = torch.tensor(shares, dtype=torch.float64).amax(0)
        torch.testing.assert_close(largest_weights(query, kv, attended, rule), expected)


OPTIONS = {"sink": SINK, "budget": 10, "local": LOCAL, "min_len": 0, "block": 16, "sub_block": 4}
LAYERS = (1, 4)
MAX_LEN = 64


class Traffic:
    """Two layers of a runner that records, over one paged pool; row 0 is that of padding."""

    def __init__(self, folder: Path, *, sliding_windows=None, trained_len=None, **options) -> None:
        folder.mkdir(exist_ok=True)
        self.config = TokenSelectConfig(**{**OPTIONS, **options}, record=str(folder))
        generator = torch.Generator().manual_seed(3)
        self.req_to_token = torch.zeros(4, MAX_LEN, dtype=torch.int32)
        self.req_to_token[1:] = 1 + torch.randperm(3 * MAX_LEN, generator=generator).view(3, MAX_LEN).int()
        shape = (len(LAYERS), 2, 3 * MAX_LEN + 1, 2, DIM)
        self.pools = torch.randn(shape, generator=generator, dtype=torch.float64)
        self.rope = rule_of("compact").rope if self.config.is_compact else None
        ropes = dict.fromkeys(LAYERS, self.rope) if self.rope else {}
        self.runner = TorchRunner(self.config, self.req_to_token, ropes)
        self.recorder = Recorder(
            folder,
            self.config,
            LAYERS,
            self.req_to_token,
            self.runner,
            trained_len=trained_len,
            sliding_windows=sliding_windows,
        )

    def layer(self, index: int) -> LayerInput:
        return LayerInput(LAYERS[index], self.pools[index, 0], self.pools[index, 1], SCALING, 0.0)

    def kv(self, index: int, row: int, seq_len: int) -> RequestKV:
        return RequestKV(self.pools[index, 0], self.pools[index, 1], self.req_to_token[row, :seq_len].long())

    def begin(self, rows_and_lengths, is_decode=True) -> torch.Tensor:
        """Queries of all layers."""
        counts = [1 if is_decode else length for _, length in rows_and_lengths]
        requests = [
            RequestPlan(row, length, sum(counts[:i]), counts[i]) for i, (row, length) in enumerate(rows_and_lengths)
        ]
        plan = ForwardPlan(is_decode, tuple(requests))
        self.runner.begin(plan)
        self.recorder.begin(plan)
        return torch.stack([torch.stack([draw_query(4, seed=10 * i + t) for t in range(sum(counts))]) for i in (1, 2)])

    def run_layer(self, index: int, queries: torch.Tensor) -> None:
        self.runner.run(queries[index], self.layer(index))
        self.recorder.record(queries[index], self.layer(index))

    def forward(self, *rows_and_lengths, is_decode=True) -> torch.Tensor:
        queries = self.begin(rows_and_lengths, is_decode)
        for index in range(len(LAYERS)):
            self.run_layer(index, queries)
        return queries


@pytest.mark.parametrize("positions", ["absolute", "compact"])
def test_a_recording_tells_what_was_attended_to(tmp_path, positions):
    traffic = Traffic(tmp_path, positions=positions)
    queries = traffic.forward((2, 50))
    (path,) = tmp_path.iterdir()
    recording = Recording.load(path)
    assert path.name == "00000000-2.npz"
    assert (recording.seq_len, recording.req_pool_idx) == (50, 2)
    assert recording.layers.tolist() == [1, 4]
    assert recording.budgets.tolist() == sorted({*BUDGETS, 10})
    assert [array.dtype.name for array in (recording.attended, recording.weights)] == ["int32", "float16"]
    rule = AttentionRule(SCALING, 0.0, traffic.rope)
    for index in range(len(LAYERS)):
        query, kv = queries[index, 0], traffic.kv(index, 2, 50)
        attended = recording.attended[index].tolist()
        assert attended == sorted({*range(SINK), *naive_ranking(query, kv, rule, 1.0)[:10], *range(45, 50)})
        shares = [naive.softmax(naive_logits(query, kv, head, attended, rule)) for head in range(4)]
        np.testing.assert_allclose(recording.weights[index], np.max(shares, axis=0), atol=1e-3)
        for row, budget in enumerate(recording.budgets.tolist()):
            actual = np.stack([recording.mass[index, row], recording.recall[index, row], recording.error[index, row]])
            np.testing.assert_allclose(actual.T, naive_fidelity(query, kv, budget, rule), rtol=1e-5)


def test_a_step_is_one_file_per_request_once_its_last_layer_has_attended(tmp_path):
    traffic = Traffic(tmp_path)
    queries = traffic.begin([(3, 40), (PADDING_ROW, 1), (1, 18)])
    traffic.run_layer(0, queries)
    assert list(tmp_path.iterdir()) == []
    traffic.run_layer(1, queries)
    traffic.forward((1, 19))
    traffic.forward((1, 12), is_decode=False)
    assert [path.name for path in recording_paths(tmp_path)] == ["00000000-3.npz", "00000001-1.npz", "00000002-1.npz"]
    assert len(list(tmp_path.iterdir())) == 3
    first, short, next_step = map(Recording.load, recording_paths(tmp_path))
    assert [x.seq_len for x in (first, short, next_step)] == [40, 18, 19]
    assert first.attended.shape == (2, 18) and (first.attended >= 0).all()
    assert (short.attended == -1).all() and (next_step.attended >= 0).all()


def test_the_query_of_each_request_is_its_own(tmp_path):
    """Two requests over the same tokens differ by their queries alone."""
    traffic = Traffic(tmp_path)
    traffic.req_to_token[2] = traffic.req_to_token[1]
    queries = traffic.forward((1, 40), (2, 40))
    for row, path in enumerate(recording_paths(tmp_path)):
        expected = naive_fidelity(queries[1, row], traffic.kv(1, 1, 40), 10, AttentionRule(SCALING))
        index = Recording.load(path).budgets.tolist().index(10)
        np.testing.assert_allclose(Recording.load(path).error[1, index], expected[:, 2], rtol=1e-5)


def test_the_fresh_selection_is_the_configured_one(tmp_path):
    """The vote's scale, and the selector: the latest 10 candidates here."""
    masses = []
    for name, options in {"as it is": {}, "scaled": {"vote_scale": 0.05}, "latest": {"selector": "window"}}.items():
        traffic = Traffic(tmp_path / name, **options)
        queries = traffic.forward((1, 50))
        recording = Recording.load(*recording_paths(tmp_path / name))
        masses.append(recording.mass[0, recording.budgets.tolist().index(10)])
    query, kv = queries[0, 0], traffic.kv(0, 1, 50)
    np.testing.assert_allclose(masses[1], naive_fidelity(query, kv, 10, AttentionRule(SCALING), 0.05)[:, 0], rtol=1e-5)
    shares = [naive.softmax(naive_logits(query, kv, head, range(50), AttentionRule(SCALING))) for head in range(4)]
    latest = [sum(head[:SINK]) + sum(head[50 - LOCAL - 10 :]) for head in shares]
    np.testing.assert_allclose(masses[2], latest, rtol=1e-5)
    assert not np.allclose(masses[0], masses[1]) and not np.allclose(masses[0], masses[2])


def test_a_dense_layer_is_a_row_without_positions(tmp_path):
    traffic = Traffic(tmp_path, dense_layers=(4,))
    traffic.forward((1, 40))
    recording = Recording.load(*recording_paths(tmp_path))
    assert (recording.attended[0] >= 0).all() and (recording.attended[1] == -1).all()
    assert (recording.weights[1] == 0).all()
    assert np.isfinite(recording.error).all(), "what a vote would keep is measured all the same"


def test_a_sliding_layer_attends_to_its_window_and_is_not_measured(tmp_path):
    traffic = Traffic(tmp_path, sliding_windows={4: 6})
    traffic.forward((1, 40))
    recording = Recording.load(*recording_paths(tmp_path))
    assert recording.attended[1].tolist() == [*range(33, 40)] + [-1] * 11
    assert np.isnan(recording.error[1]).all() and np.isfinite(recording.error[0]).all()


def test_beyond_the_trained_length_nothing_is_measured(tmp_path):
    traffic = Traffic(tmp_path, positions="compact", trained_len=40)
    traffic.forward((1, 40), (2, 41))
    within, beyond = map(Recording.load, recording_paths(tmp_path))
    assert np.isfinite(within.error).all() and np.isfinite(within.mass).all()
    assert np.isnan(beyond.error).all() and np.isnan(beyond.mass).all() and np.isnan(beyond.recall).all()
    assert (beyond.attended >= 0).all()


def test_another_server_continues_the_folder(tmp_path):
    (tmp_path / "notes-1.npz").write_text("somebody's")
    for _ in range(2):
        Traffic(tmp_path).forward((1, 40))
    assert [path.name for path in recording_paths(tmp_path)] == ["00000000-1.npz", "00000001-1.npz"]


def test_a_reused_selection_is_told_with_what_has_left_the_local_window_since(tmp_path):
    """Each step asks the same queries, so the selection of the first serves the second."""
    traffic = Traffic(tmp_path)
    traffic.forward((1, 50))
    traffic.forward((1, 52))
    first, second = (set(Recording.load(path).attended[0].tolist()) for path in recording_paths(tmp_path))
    assert traffic.runner.counters.reuses == len(LAYERS)
    latest = set(range(45, 52))
    assert latest <= second and second - latest < first and len(second) == len(first) == 18


@pytest.mark.parametrize("folder", ["taken", "taken/below"])
def test_a_folder_that_cannot_be_made_is_refused_at_start(tmp_path, folder):
    (tmp_path / "taken").write_text("")
    args = SimpleNamespace(attention_backend="tokenselect", device="cpu")
    with pytest.raises(refusals.Refusal, match="record: expected a folder to write to, got .*taken"):
        refusals.check_server_args(args, TokenSelectConfig(record=str(tmp_path / folder)))
    refusals.check_server_args(args, TokenSelectConfig(record=str(tmp_path / "new" / "folder")))
    assert list((tmp_path / "new" / "folder").iterdir()) == []


def test_a_gpu_with_decode_graphs_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(compat, "untested_on_gpus", lambda: None)
    graphs = SimpleNamespace(prefill=SimpleNamespace(backend="disabled"), decode=SimpleNamespace(backend="full"))
    args = SimpleNamespace(attention_backend="tokenselect", device="cuda", enable_lora=None, cuda_graph_config=graphs)
    config = TokenSelectConfig(record=str(tmp_path))
    with pytest.raises(refusals.Refusal, match="cuda_graph_backend_decode: expected 'disabled', got 'full' .*record"):
        refusals.check_server_args(args, config)
    graphs.decode.backend = "disabled"
    refusals.check_server_args(args, config)


def test_a_gpu_tells_the_same_positions(tmp_path):
    """The kernels on a GPU, or in Triton's interpreter; FlashInfer's place is taken by a twin."""
    pytest.importorskip("sglang.kernels.ops.kvcache.kv_indices", reason="GPUs are served with SGLang 0.5.17")
    from sglang_tokenselect.gpu_buffers import GpuBuffers
    from sglang_tokenselect.gpu_runner import GpuRunner
    from sglang_tokenselect.model_shape import ModelShape

    config, head_dim, dtype = TokenSelectConfig(**OPTIONS, record=str(tmp_path)), 64, torch.float16
    generator = torch.Generator().manual_seed(5)
    pools = torch.randn(2, 3 * MAX_LEN + 1, 2, head_dim, generator=generator).to(DEVICE, dtype)
    slots = 1 + torch.randperm(3 * MAX_LEN, generator=generator).view(3, MAX_LEN).int().to(DEVICE)
    slots[1, :41] = slots[2, :41]  # a shared prefix, of which each attends to tokens of its own
    buffers = GpuBuffers.allocate(config, ModelShape(1, 4, 2, head_dim, dtype, dtype, MAX_LEN), 3, DEVICE)
    on_gpu = GpuRunner(config, (0,), buffers, slots, DecodeTwin(0.0, None), PrefillTwin(0.0, None))
    expected = TorchRunner(config, slots, {})
    requests = tuple(RequestPlan(row, n, i, 1) for i, (row, n) in enumerate([(2, 41), (0, 18), (1, 64)]))
    batch = SimpleNamespace(
        req_pool_indices=torch.tensor([2, 0, 1], device=DEVICE), seq_lens=torch.tensor([41, 18, 64], device=DEVICE)
    )
    query = 3 * torch.randn(3, 4, head_dim, generator=generator).to(DEVICE, dtype)
    for runner in (on_gpu, expected):
        runner.begin(ForwardPlan(True, requests), batch)
        runner.run(query, LayerInput(0, pools[0], pools[1], SCALING, 0.0))
    assert on_gpu.attended_positions(requests[1], 0) is expected.attended_positions(requests[1], 0) is None
    for request in (requests[0], requests[2]):
        actual = on_gpu.attended_positions(request, 0)
        assert actual.tolist() == expected.attended_positions(request, 0).tolist()
        assert len(actual) == config.window.size


def failure_of_session(monkeypatch, server, error=None):
    """What a command says if its server does not start, or if asking it ends with this error."""
    monkeypatch.setattr(session, "recording_server", lambda *_: server)
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("NO_PROXY", "")
    with pytest.raises(SystemExit) as info, session.recording_session(ServerOptions()):
        raise error
    server.log_path.unlink()
    return str(info.value)


class ReadyServer(ServerProcess):
    def start(self):
        pass

    def wait_until_ready(self):
        pass

    def report(self):
        return {"config": TokenSelectConfig().to_options()}


def test_a_server_that_does_not_start_is_told_with_its_log(monkeypatch):
    server = ServerProcess("model", launcher=("-c", "print('no such flag')"))
    said = failure_of_session(monkeypatch, server)
    assert re.match(r"server: expected an answer, got server not ready after .*\nno such flag\n", said, re.DOTALL)
    assert said.endswith(f"\nIts log: {server.log_path}")


def test_what_a_server_refuses_is_told_with_its_reason(monkeypatch):
    error = urllib.error.HTTPError("url", 400, "Bad Request", {}, io.BytesIO(b"the input is too long"))
    said = failure_of_session(monkeypatch, ReadyServer("model"), error)
    assert said == "server: expected an answer, got HTTP Error 400: Bad Request: the input is too long"


def test_a_server_that_ends_in_between_is_told_with_its_log(monkeypatch):
    server = ReadyServer("model")
    said = failure_of_session(monkeypatch, server, ConnectionResetError("reset"))
    assert said == f"server: expected an answer, got reset\nIts log: {server.log_path}"
