# SPDX-License-Identifier: Apache-2.0
"""`sglang-tokenselect fidelity` without a server: its sums, what it advises, prompts, errors."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from sglang_tokenselect.cli import build_parser
from sglang_tokenselect.config import TokenSelectConfig
from sglang_tokenselect.demo_questions import token_counter
from sglang_tokenselect.fidelity.command import check_prompt, run_fidelity
from sglang_tokenselect.fidelity.figure import write_figure
from sglang_tokenselect.fidelity.options import FidelityOptions
from sglang_tokenselect.fidelity.prompts import read_prompts
from sglang_tokenselect.fidelity.summary import Summary
from sglang_tokenselect.needle import checkpoint_path
from sglang_tokenselect.recording.options import ServerOptions
from sglang_tokenselect.recording.recording import Recording


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
    options = FidelityOptions(tmp_path, ServerOptions(), prompts=(), num_steps=1, max_error=0.1)
    with pytest.raises(SystemExit, match="--prompts: expected text files with --model-path, got none"):
        run_fidelity(replace(options, server=ServerOptions("model")))
    with pytest.raises(SystemExit, match="--prompts: expected a text file, got .*missing.txt"):
        run_fidelity(replace(options, prompts=(tmp_path / "missing.txt",)))
    (tmp_path / "taken").write_text("")
    with pytest.raises(SystemExit, match="--out: expected a folder, got .*taken"):
        run_fidelity(replace(options, out=tmp_path / "taken"))


def test_the_default_prompts_fit_the_trained_length():
    trained = json.loads((checkpoint_path() / "config.json").read_text())["max_position_embeddings"]
    count, prompts = token_counter(checkpoint_path()), read_prompts(())
    assert len(prompts) == 4
    assert all(3800 < count(prompt) < trained - 100 for prompt in prompts.values())


def test_flags_of_the_server_stand_behind_two_dashes():
    parser = build_parser()
    args = parser.parse_args(["fidelity", "--out", "d", "--prompts", "a", "b", "--", "--device", "cpu"])
    options = FidelityOptions.of(args)
    assert options.server.flags == ("--device", "cpu") and [str(path) for path in options.prompts] == ["a", "b"]
    for wrong in ("0", "-1", "nan", "inf", "x"):
        with pytest.raises(SystemExit):
            parser.parse_args(["fidelity", "--out", "d", "--max-error", wrong])
