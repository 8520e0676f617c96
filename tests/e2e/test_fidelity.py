# SPDX-License-Identifier: Apache-2.0
"""`sglang-tokenselect fidelity` on a real server, against attention that transformers computes."""

from __future__ import annotations

import csv
import subprocess
import sys

import numpy as np
import pytest
import torch

from sglang_tokenselect.demo_questions import draw_samples, token_counter
from sglang_tokenselect.needle import checkpoint_path

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
