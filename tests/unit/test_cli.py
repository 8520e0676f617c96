# SPDX-License-Identifier: Apache-2.0
"""The command line and the parts of the demo that need no server."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from sglang_tokenselect import cli, demo, demo_questions, demo_view
from sglang_tokenselect.demo import Answer, Row
from sglang_tokenselect.needle import checkpoint_path, tasks

RIGHT = Answer(
    text="123456", is_right=True, prompt_tokens=8100, cached_tokens=0, seconds=1.25, attended=640.0, attended_share=0.08
)
WRONG = Answer(text="654321", is_right=False, prompt_tokens=8100, cached_tokens=0, seconds=2.0)
ROW = Row(8192, "multi_key", "number of amber", ("123456",), tokenselect=RIGHT, dense=WRONG)


@pytest.fixture(scope="module")
def count_tokens():
    return demo_questions.token_counter(checkpoint_path())


def parse_demo(*argv: str):
    return cli.build_parser().parse_args(["demo", *argv])


def test_demo_options_reach_the_namespace():
    args = parse_demo("--lengths", "4096,9000", "--questions", "2", "--seed", "7")
    assert (args.lengths, args.questions, args.seed) == ((4096, 9000), 2, 7)


def test_demo_defaults_reach_eight_times_the_trained_length():
    assert parse_demo().lengths[-1] == 8 * parse_demo().lengths[0]


@pytest.mark.parametrize(
    ("argv", "expected", "got"),
    [
        (("--lengths", ""), "token counts", "''"),
        (("--lengths", "4096,"), "token counts", "'4096,'"),
        (("--lengths", "12"), "from 1024", "'12'"),
        (("--lengths", "1000000"), "such as 4096,8192", "'1000000'"),
        (("--questions", "0"), "from 1 to 12", "'0'"),
        (("--questions", "two"), "an integer", "'two'"),
        (("--seed", "-1"), "an integer", "'-1'"),
    ],
)
def test_bad_values_are_refused_with_what_was_expected(argv, expected, got, capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse_demo(*argv)
    error = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert expected in error and f"got {got}" in error


def test_monitor_and_ctl_need_no_options():
    monitor = cli.build_parser().parse_args(["monitor"])
    assert (monitor.endpoint, monitor.once, monitor.json, monitor.timeout) == (cli.DEFAULT_PUBLISH, False, False, 5.0)
    ctl = cli.build_parser().parse_args(["ctl", "get"])
    assert (ctl.endpoint, ctl.json, ctl.timeout, ctl.command) == (cli.DEFAULT_CONTROL, False, 5.0, "get")


def test_ctl_settings_have_their_options_types():
    texts = ("policy=slo", "level=2", "itl_target_ms=9", "min_mass=none")
    settings = cli.build_parser().parse_args(["ctl", "set", *texts]).settings
    assert settings == [("policy", "slo"), ("level", 2), ("itl_target_ms", 9.0), ("min_mass", None)]


@pytest.mark.parametrize(
    ("argv", "expected", "got"),
    [
        (("monitor", "localhost:30100"), "tcp://HOST:PORT or ipc:///PATH", "'localhost:30100'"),
        (("monitor", "--timeout", "0"), "seconds above 0", "'0'"),
        (("monitor", "--timeout", "inf"), "up to 86400", "'inf'"),
        (("ctl", "--endpoint", "udp://127.0.0.1:1", "get"), "tcp://HOST:PORT or ipc:///PATH", "'udp://127.0.0.1:1'"),
        (("ctl", "set", "budget=1"), "NAME=VALUE with a name of policy, level,", "'budget=1'"),
        (("ctl", "set", "level"), "a value of type int", "'level'"),
        (("ctl", "set", "level=two"), "a value of type int", "'level=two'"),
        (("ctl", "set", "level=none"), "an integer", "None"),
        (("ctl", "set", "itl_target_ms=nan"), "a finite number", "nan"),
        (("ctl", "set", "policy=best"), "one of fixed, load, slo", "'best'"),
    ],
)
def test_bad_values_of_monitor_and_ctl_are_refused(argv, expected, got, capsys):
    with pytest.raises(SystemExit) as exit_info:
        cli.build_parser().parse_args(argv)
    error = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert expected in error and f"got {got}" in error


def test_no_command_is_an_error():
    with pytest.raises(SystemExit):
        cli.build_parser().parse_args([])


@pytest.mark.parametrize("length", [1024, 4096])
@pytest.mark.parametrize("num_questions", [1, 5, 12])
def test_questions_share_one_context_that_fits_its_length(length, num_questions, count_tokens):
    samples = demo_questions.draw_samples(length, num_questions, seed=3, count_tokens=count_tokens)
    assert len(samples) == num_questions
    assert len({sample.context.text for sample in samples}) == 1
    for sample in samples:
        tokens = count_tokens(sample.prompt + sample.completion)
        assert length - 2 * demo_questions.ROOM_TO_ANSWER < tokens <= length
        assert tasks.score(sample.completion, sample.answers) == 1.0


def test_questions_follow_from_the_seed(count_tokens):
    def prompts(seed):
        return [s.prompt for s in demo_questions.draw_samples(2048, 4, seed=seed, count_tokens=count_tokens)]

    assert prompts(0) == prompts(0)
    assert prompts(0) != prompts(1)


def test_short_question_names_what_is_asked(count_tokens):
    one, _, two, variables = demo_questions.draw_samples(2048, 4, seed=0, count_tokens=count_tokens)
    needle = one.context.facts.needles[0]
    assert demo_questions.short_question(one) == f"number of {needle.key}"
    assert demo_questions.short_question(two).startswith("numbers of ")
    assert demo_questions.short_question(variables) == f"variables = {variables.context.facts.chains[0].value}"


def test_attended_is_the_mean_over_the_steps_between_two_readings():
    before = {"decode_queries": 10, "attended_tokens": 1000, "cached_tokens": 9000}
    after = {"decode_queries": 14, "attended_tokens": 3560, "cached_tokens": 41000}
    assert demo.attended_between(before, after) == {"attended": 640.0, "attended_share": 0.08}
    assert demo.attended_between(before, before) == {}


def test_cells_say_right_and_wrong_in_words():
    assert demo_view.cells(ROW) == [
        *("8,192", "number of amber", "123456"),
        *("✓ right 123456", "640   8.0%", "1.2 s", "✗ wrong 654321", "2.0 s"),
    ]


@pytest.mark.parametrize(
    ("task", "text", "said"),
    [
        ("multi_query", "for amber is 123456, for cedar is 234567", "123456, 234567"),
        ("variable_tracking", "123456 are BAX, KIP, ROZ", "BAX, KIP, ROZ"),
        ("multi_key", "is is is is is is", "is is is is i…"),
        ("multi_key", "", "(nothing)"),
    ],
)
def test_verdict_shows_what_was_asked_for_or_else_the_text(task, text, said):
    assert demo_view.verdict(replace(WRONG, text=text), task) == f"✗ wrong {said}"


def test_without_a_terminal_rows_are_plain_lines():
    out = io.StringIO()
    with demo_view.open_view(Console(file=out, width=40)) as view:
        view.status("starting")
        view.add(ROW)
        view.status("asking")
        view.add(ROW)
    lines = out.getvalue().splitlines()
    assert lines[0] == "starting" and "asking" not in lines
    assert [line.split()[0] for line in lines[2:]] == ["length", "------", "8,192", "8,192"]


def test_in_a_terminal_the_table_stands_above_the_status():
    console = Console(file=io.StringIO(), width=120, height=40, force_terminal=True, color_system=None)
    view = demo_view.LiveView(console)
    view.add(ROW)
    view.status("dense answers about 8,192 tokens")
    console.print(view)
    text = console.file.getvalue()
    assert text.index("✗ wrong 654321") < text.index("dense answers about 8,192 tokens (0 s)")


def test_a_low_terminal_shows_the_last_rows_until_the_end():
    console = Console(file=io.StringIO(), width=120, height=12, force_terminal=True, color_system=None)
    with demo_view.open_view(console) as view:
        for length in range(1000, 1030):
            view.add(replace(ROW, length=length))
        view.status("asking")
        console.print(view)
        running = console.file.getvalue()
    assert "1,029" in running and "asking" in running and "1,000" not in running
    assert "1,000" in console.file.getvalue()


@pytest.mark.parametrize(("num_wrong", "answered"), [(0, True), (1, True), (2, False)])
def test_one_wrong_answer_in_ten_is_tolerated(num_wrong, answered):
    rows = [replace(ROW, tokenselect=WRONG)] * num_wrong + [ROW] * (10 - num_wrong)
    assert demo.has_answered(rows) is answered


def test_no_answers_are_no_success():
    assert not demo.has_answered([])


def test_summary_is_about_the_longest_context():
    text = demo.summary([ROW, replace(ROW, length=4096)], seconds=61.0)
    assert text == (
        "tokenselect answered 2 of 2 questions, attending to 8.0% of the cached tokens at a length of 8,192; "
        "dense answered 0 (61 s)."
    )


def test_missing_checkpoint_is_told_before_anything_starts(tmp_path):
    with pytest.raises(SystemExit, match="model.safetensors"):
        demo.run_demo(demo.DemoOptions(lengths=(4096,), num_questions=1, seed=0, model_path=tmp_path))
