# SPDX-License-Identifier: Apache-2.0
"""On a GPU: the other selectors, recordings, and the commands that read them."""

from __future__ import annotations

import csv
import statistics
import subprocess
import sys

import numpy as np
import pytest
from accelerator import NEEDS_CUDA
from traffic import counted

from sglang_tokenselect.demo_questions import draw_samples, token_counter
from sglang_tokenselect.fidelity.prompts import read_prompts
from sglang_tokenselect.needle import checkpoint_path, tasks
from sglang_tokenselect.needle_server import DEVICES, needle_server
from sglang_tokenselect.recording.session import generate_recorded, record_flags
from sglang_tokenselect.selectors import SELECTORS

pytestmark = NEEDS_CUDA

COUNT_TOKENS = token_counter(checkpoint_path())
SAMPLES = draw_samples(8192, 8, 101, COUNT_TOKENS)
SAMPLING = {"temperature": 0.0, "max_new_tokens": 48, "stop": ["\n", "."]}
WINDOW = 64 + 448 + 128
EAGER = ("--cuda-graph-backend-decode", "disabled")
LEAST = {"vote": 0.95, "mean": 0.8, "page": 0.6, "window": 0.0}
MOST = {"window": 0.3}


@pytest.mark.parametrize("selector", SELECTORS)
def test_selectors_choose_as_many_tokens_and_answer(selector):
    eager = () if SELECTORS[selector].has_kernels else EAGER
    with needle_server(False, "--tokenselect-selector", selector, *eager, device="cuda") as server:

        def ask():
            answers = [server.post("/generate", {"text": s.prompt, "sampling_params": SAMPLING}) for s in SAMPLES]
            return statistics.fmean(tasks.score(a["text"], s.answers) for a, s in zip(answers, SAMPLES, strict=True))

        score, counters = counted(server, ask)
    print(f"{selector}: {score:.3f}")
    assert LEAST[selector] <= score <= MOST.get(selector, 1.0)
    assert counters["attended_tokens"] == WINDOW * counters["decode_queries"]
    assert counters["block_votes"] > 0


@pytest.mark.parametrize("selector", ["vote", "page"])
def test_recordings_hold_what_each_layer_attended_to(selector, tmp_path):
    """The kernels' and PyTorch's: as many positions as the window has, and the number asked for among them."""
    sample = SAMPLES[0]
    flags = ("--tokenselect-selector", selector, "--tokenselect-theta", "2", *record_flags(tmp_path))
    with needle_server(False, *flags, device="cuda") as server:
        recorded = generate_recorded(server, tmp_path, {"text": sample.prompt, "sampling_params": SAMPLING})
    assert tasks.score(recorded.answer["text"], sample.answers) == 1.0
    asked = COUNT_TOKENS(sample.prompt[: sample.prompt.index(sample.answers[0])])
    heaviest = 0.0
    for recording in recorded.recordings:
        assert recording.attended.shape == (4, WINDOW)
        for attended, weights in zip(recording.attended, recording.weights, strict=True):
            n = recording.seq_len
            assert (np.diff(attended) > 0).all()
            assert attended[:64].tolist() == [*range(64)] and attended[-128:].tolist() == [*range(n - 128, n)]
            near = abs(attended - asked) <= 2
            heaviest = max(heaviest, weights[near].max(initial=0.0))
    assert heaviest > 0.3


def test_recording_is_refused_with_decode_graphs(tmp_path):
    server = needle_server(False, "--tokenselect-record", str(tmp_path), device="cuda")
    with pytest.raises(RuntimeError, match="cuda_graph_backend_decode: expected 'disabled', got 'full'"):
        server.__enter__()


def fidelity(folder, flags):
    """Means over heads by (layer, budget): mass, recall, error."""
    prompts = []
    for name, text in read_prompts(()).items():
        prompts.append(folder / f"{name.replace(' ', '_')}.txt")
        prompts[-1].write_text(text)
    own = ("--tokenselect-min-len", "0", "--tokenselect-sink", "64", "--tokenselect-budget", "448")
    command = [sys.executable, "-m", "sglang_tokenselect.cli", "fidelity", "--model-path", str(checkpoint_path())]
    command += ["--prompts", *map(str, prompts), "--out", str(folder), "--tokens", "4", "--", *own, *flags]
    done = subprocess.run([*command, "--tokenselect-local", "128"], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    cells = {}
    with (folder / "fidelity.csv").open() as file:
        for row in csv.DictReader(file):
            measures = [float(row[name]) for name in ("mass", "error")]
            cells.setdefault((int(row["layer"]), int(row["budget"])), []).append(measures)
    return {key: np.mean(rows, axis=0) for key, rows in cells.items()}


def test_fidelity_is_that_of_the_cpu(tmp_path, monkeypatch):
    """Trajectories are dense, FlashInfer's in bfloat16 and PyTorch's in float32."""
    for name in ("gpu", "cpu"):
        (tmp_path / name).mkdir()
    on_gpu = fidelity(tmp_path / "gpu", DEVICES["cuda"][1])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    on_cpu = fidelity(tmp_path / "cpu", DEVICES["cpu"][1])
    assert on_gpu.keys() == on_cpu.keys()
    worst = max(abs(on_gpu[key] - on_cpu[key]).max() for key in on_gpu)
    print(f"fidelity: {worst:.3f} between GPU and CPU at most")
    assert worst < 0.02


def test_trace_of_a_gpu_server(tmp_path):
    sample = SAMPLES[0]
    (tmp_path / "prompt.txt").write_text(sample.prompt)
    command = [sys.executable, "-m", "sglang_tokenselect.cli", "trace", "--model-path", str(checkpoint_path())]
    command += ["--prompt", str(tmp_path / "prompt.txt"), "--mark", sample.answers[0], "--tokens", "8"]
    own = ("--tokenselect-positions", "compact", "--tokenselect-budget", "448", "--tokenselect-sub-block", "4")
    sizes = ("--tokenselect-sink", "64", "--tokenselect-local", "128", "--context-length", "20000")
    flags = ["--out", str(tmp_path / "page.html"), "--", *DEVICES["cuda"][1], *own, *sizes]
    done = subprocess.run([*command, *flags], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert sample.answers[0] in done.stdout
    assert (tmp_path / "page.html").stat().st_size > 10_000
