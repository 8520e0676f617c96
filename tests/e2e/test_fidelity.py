# SPDX-License-Identifier: Apache-2.0
"""`sglang-tokenselect fidelity` on a real server, against attention that transformers computes; and what it advises."""

from __future__ import annotations

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
import torch

from sglang_tokenselect.cli import build_parser
from sglang_tokenselect.config import TokenSelectConfig
from sglang_tokenselect.demo_questions import draw_samples, token_counter
from sglang_tokenselect.fidelity.command import FidelityOptions, check_prompt, run_fidelity
from sglang_tokenselect.fidelity.figure import write_figure
from sglang_tokenselect.fidelity.prompts import read_prompts
from sglang_tokenselect.fidelity.summary import Summary
from sglang_tokenselect.needle import checkpoint_path
from sglang_tokenselect.recording.recording import Recording

BUDGETS = (0, 256, 300, 512, 1024, 2048, 4096)
SINK, LOCAL = 64, 128
MEASURES = ("mass", "recall", "error")
PROMPT = draw_samples(1500, 1, 5, token_counter(checkpoint_path()))[0].prompt


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """One decode step of one prompt, so that the means are that step's: rows by (layer, head, budget); the output."""
    folder = tmp_path_factory.mktemp("fidelity")
    (folder / "prompt.txt").write_text(PROMPT)
    command = [sys.executable, "-m", "sglang_tokenselect.cli", "fidelity", "--out", folder / "out", "--tokens", "1"]
    command += ["--prompts", folder / "prompt.txt", "--", "--tokenselect-budget", "300"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    with (folder / "out" / "fidelity.csv").open() as file:
        rows = {tuple(int(row[name]) for name in ("layer", "head", "budget")): row for row in csv.DictReader(file)}
    assert (folder / "out" / "fidelity.png").read_bytes().startswith(b"\x89PNG")
    return {key: np.array([float(row[name]) for name in MEASURES]) for key, row in rows.items()}, done.stdout


@torch.inference_mode()
def attention_of_the_first_step():
    """Of transformers in float64: probabilities [L, H, n] of the query that reads the first greedy token, values."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint_path(), dtype=torch.float64, attn_implementation="eager"
    )
    values = []
    for layer in model.model.layers:
        layer.self_attn.v_proj.register_forward_hook(lambda module, args, out: values.append(out[0]))
    ids = transformers.AutoTokenizer.from_pretrained(checkpoint_path())(PROMPT, return_tensors="pt").input_ids
    first = model(ids).logits[0, -1].argmax().view(1, 1)
    values.clear()
    attentions = model(torch.cat([ids, first], dim=1), output_attentions=True).attentions
    return torch.stack([layer[0, :, -1] for layer in attentions]), torch.stack(values)


def expected_measures(probabilities, value, budget, head_dim=64):
    """mass, recall, error of each head of one layer: [H, 3].

    Args:
        probabilities: [H, n] of dense attention.
        value: [n, H_kv * head_dim].
    """
    num_heads, n = probabilities.shape
    value = value.view(n, -1, head_dim).repeat_interleave(2, dim=1)
    candidates = slice(SINK, n - LOCAL)
    # The vote's logits are not divided by sqrt(head_dim), those of the attention are.
    votes = (probabilities[:, candidates].log() * head_dim**0.5).softmax(-1).sum(0)
    chosen = SINK + votes.sort(descending=True, stable=True).indices[:budget]
    attended = torch.zeros(n, dtype=torch.bool)
    attended[chosen] = attended[:SINK] = attended[n - LOCAL :] = True
    best = SINK + probabilities[:, candidates].sort(descending=True, stable=True).indices[:, :budget]
    mass = (probabilities * attended).sum(-1)
    dense = torch.einsum("hn,nhd->hd", probabilities, value)
    sparse = torch.einsum("hn,nhd->hd", probabilities * attended / mass[:, None], value)
    return torch.stack([mass, attended[best].double().mean(-1), (sparse - dense).norm(dim=-1) / dense.norm(dim=-1)], 1)


def test_the_figures_are_those_of_transformers_attention(run):
    rows, _ = run
    probabilities, values = attention_of_the_first_step()
    for layer in range(4):
        for budget in BUDGETS:
            actual = np.stack([rows[layer, head, budget] for head in range(4)])
            expected = expected_measures(probabilities[layer], values[layer], budget).numpy()
            # Served in float32 from float32 keys; a member at the margin may turn.
            np.testing.assert_allclose(actual, expected, atol=5e-3)
            assert budget == 0 or np.isfinite(actual).all()


def test_the_table_is_complete_and_mass_grows_with_the_budget(run):
    rows, _ = run
    assert set(rows) == {(layer, head, budget) for layer in range(4) for head in range(4) for budget in BUDGETS}
    for layer in range(4):
        for head in range(4):
            mass, recall, error = np.stack([rows[layer, head, budget] for budget in BUDGETS]).T
            assert (np.diff(mass) >= 0).all() and mass[0] < 1
            assert np.isnan(recall[0]) and (recall[1:] > 0).all()
            # 1,308 candidates or so: the two largest budgets leave none out.
            assert (error[-2:] == 0).all() and (mass[-2:] == 1).all() and (recall[-2:] == 1).all()
            assert (error[:-2] > 0).all()


def test_it_prints_each_layer_and_what_to_do(run):
    rows, output = run
    error = np.array([[rows[layer, head, 300][2] for head in range(4)] for layer in range(4)])
    for layer in range(4):
        cells = next(line for line in output.splitlines() if line.startswith(f"{layer:5}  ")).split()
        assert [float(cells[5]), float(cells[6])] == pytest.approx([error[layer].mean(), error[layer].max()], abs=1e-3)
    lossy = [layer for layer in range(4) if error[layer].mean() > 0.1]
    assert lossy and len(lossy) < 4, "a case with advice"
    assert f"--tokenselect-dense-layers {','.join(map(str, lossy))}\n" in output
    assert "at a budget of 300" in output


def recordings(error, seq_len=1000, num_heads=2):
    """One of layers 0, 1, ... with these errors at budgets 0, 256 and 512, the same for all heads."""
    error = np.repeat(np.asarray(error, dtype=np.float32)[:, :, None], num_heads, axis=2)
    layers = np.arange(len(error), dtype=np.int32)
    empty = np.empty((len(error), 0), np.int32)
    budgets = np.array([0, 256, 512], np.int32)
    return (Recording(seq_len, 1, layers, empty, empty, budgets, 1 - error, 1 - error, error),)


def advice(error, *, seq_len=1000, **config):
    config = TokenSelectConfig(**{"budget": 256, "sink": 10, "local": 20, "min_len": 0, **config})
    return Summary.of(recordings(error, seq_len), config).advice(0.1)


LOW, EARLY, LATE, NEVER = [0.05, 0.01, 0.0], [0.2, 0.1, 0.0], [0.3, 0.2, 0.05], [0.9, 0.8, 0.7]


def test_layers_within_the_limit_stay_sparse():
    assert advice([LOW, EARLY]).splitlines() == [
        "No layer exceeds a mean output error of 0.1 at a budget of 256.",
        "The least measured budget at which all layers stay below it: --tokenselect-budget 256",
    ]
    assert advice([LOW, LOW]).endswith("--tokenselect-budget 0")
    # Each layer, not their mean.
    assert advice([LOW, LOW, [0.15, 0.05, 0.0]]).endswith("--tokenselect-budget 256")


def test_layers_beyond_it_are_named_and_the_others_decide_the_budget():
    text = advice([LATE, LOW, NEVER, LOW])
    assert "--tokenselect-dense-layers 0,2\n" in text
    assert text.endswith("all other layers stay below it: --tokenselect-budget 0")
    assert advice([NEVER, EARLY]).endswith("all other layers stay below it: --tokenselect-budget 256")


def test_dense_layers_are_not_advised_where_they_are_refused():
    text = advice([LATE, LOW], positions="compact")
    assert "Layers 0 exceed" in text and "dense-layers" not in text and "compact" in text
    assert text.endswith("all layers stay below it: --tokenselect-budget 512")
    assert "dense-layers" not in advice([LATE, NEVER])
    assert "All layers exceed" in advice([LATE, NEVER])


def test_a_budget_that_holds_everything_is_no_advice():
    """530 tokens have 500 candidates: at 512 nothing is chosen."""
    text = advice([LATE, NEVER[:2] + [0.0]], seq_len=530)
    assert text.endswith("At no measured budget below the 500 candidates do all layers stay below it.")


def test_layers_that_are_not_measured_are_left_out(tmp_path):
    (recording,) = recordings([LOW, [np.nan] * 3, LATE])
    summary = Summary.of([recording, recording], TokenSelectConfig(budget=256, sink=10, local=20))
    assert summary.layers == (0, 2) and summary.num_queries == 2
    assert "--tokenselect-dense-layers 2" in summary.advice(0.1)
    summary.write_csv(tmp_path / "f.csv")
    assert len((tmp_path / "f.csv").read_text().splitlines()) == 1 + 2 * 2 * 3
    write_figure(summary, 0.1, tmp_path / "f.png")
    assert (tmp_path / "f.png").stat().st_size > 10_000


def test_means_are_those_of_all_queries():
    parts = [*recordings([LOW, LATE]), *recordings([LATE, LATE], seq_len=900)]
    summary = Summary.of(parts, TokenSelectConfig(budget=256, sink=10, local=20))
    np.testing.assert_allclose(summary.error[0, :, 0], np.mean([LOW, LATE], axis=0), rtol=1e-6)
    assert summary.num_candidates == 870


def test_prompts_that_nothing_can_be_told_of_are_refused():
    config = TokenSelectConfig(budget=256, sink=10, local=20)
    check_prompt("a.txt", recordings([LOW], seq_len=287), config)
    with pytest.raises(SystemExit, match=r"^a.txt: expected at least 286 tokens \(sink \+ budget .* got 285$"):
        check_prompt("a.txt", recordings([LOW], seq_len=286), config)
    with pytest.raises(SystemExit, match="a.txt: expected at most the model's trained length, .* got 5000 tokens"):
        check_prompt("a.txt", recordings([[np.nan] * 3], seq_len=5000), config)


def test_prompts_are_text_files_and_belong_to_the_model(tmp_path):
    options = {"out": tmp_path, "num_steps": 1, "max_error": 0.1, "server_flags": ()}
    with pytest.raises(SystemExit, match="prompts: expected text files with --model-path, got none"):
        run_fidelity(FidelityOptions(model_path="model", prompts=(), **options))
    with pytest.raises(SystemExit, match="prompts: expected a text file, got .*missing.txt"):
        run_fidelity(FidelityOptions(model_path=None, prompts=(tmp_path / "missing.txt",), **options))


def test_the_default_prompts_fit_the_trained_length():
    trained = json.loads((checkpoint_path() / "config.json").read_text())["max_position_embeddings"]
    count, prompts = token_counter(checkpoint_path()), read_prompts(())
    assert len(prompts) == 4
    assert all(3800 < count(prompt) < trained - 100 for prompt in prompts.values())


def test_flags_of_the_server_stand_behind_two_dashes():
    parser = build_parser()
    args = parser.parse_args(["fidelity", "--out", "d", "--prompts", "a", "b", "--", "--device", "cpu"])
    assert args.server_flags == ["--device", "cpu"] and [str(path) for path in args.prompts] == ["a", "b"]
    for wrong in ("0", "-1", "nan", "inf", "x"):
        with pytest.raises(SystemExit):
            parser.parse_args(["fidelity", "--out", "d", "--max-error", wrong])
