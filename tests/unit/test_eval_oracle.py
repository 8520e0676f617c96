# SPDX-License-Identifier: Apache-2.0
"""All of `sglang-tokenselect eval` with a server that knows every answer, and one that knows none."""

from __future__ import annotations

import string

from evaluations import SETTINGS, evaluate
from openai_server import serving

from sglang_tokenselect.evaluation.drawer import Drawer
from sglang_tokenselect.evaluation.scores import cells, seed_cells
from sglang_tokenselect.evaluation.settings import Key
from sglang_tokenselect.evaluation.store import read_records, read_run
from sglang_tokenselect.evaluation.tasks.registry import SUITES, TASKS
from sglang_tokenselect.evaluation.tokenizer import load_tokenizer

LENGTH = 1500
SAMPLES = 2
KINDS = (string.ascii_lowercase, string.ascii_uppercase, string.digits)
# Every letter and digit becomes the next one of its kind.
WRONG = str.maketrans("".join(KINDS), "".join(kind[1:] + kind[0] for kind in KINDS))


def sentence(answers):
    return f" surely this: {' and '.join(answers)}. I am sure."


def test_gold_answers_score_1_and_wrong_ones_0_in_every_task(tokenizer, tmp_path, capsys):
    drawer = Drawer(SETTINGS, load_tokenizer(tokenizer, "completions"))
    samples = [drawer.draw(Key("", task, LENGTH, 0, index)) for task in TASKS for index in range(SAMPLES)]
    gold = {sample.prompt + sample.answer_prefix: sentence(sample.answers) for sample in samples}
    assert len(gold) == SAMPLES * len(TASKS)
    options = ("--tasks", ",".join(SUITES), "--lengths", str(LENGTH), "--samples", str(SAMPLES))
    with (
        serving(lambda prompt: (200, gold[prompt])) as right,
        serving(lambda prompt: (200, gold[prompt].translate(WRONG))) as wrong,
    ):
        assert evaluate(right, tokenizer, tmp_path / "out", *options, "--names", "right") == 0
        assert evaluate(wrong, tokenizer, tmp_path / "out", *options, "--names", "wrong") == 0
    run = read_run(tmp_path / "out")
    found = {(cell.target, cell.task): cell for cell in cells(run, seed_cells(run, read_records(tmp_path / "out")))}
    expected = {(target, task): score for target, score in (("right", 1.0), ("wrong", 0.0)) for task in TASKS}
    assert {where: cell.mean for where, cell in found.items()} == expected
    assert all(cell.is_whole and cell.questions == SAMPLES for cell in found.values())
    assert capsys.readouterr().out.count(" -1.000\n") == len(TASKS)
