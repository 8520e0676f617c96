# SPDX-License-Identifier: Apache-2.0
"""The options of `sglang-tokenselect eval`."""

from __future__ import annotations

import pytest

from sglang_tokenselect import cli
from sglang_tokenselect.evaluation.options import named_urls
from sglang_tokenselect.evaluation.tasks.registry import SUITES, TASKS


def parse(*argv):
    return cli.build_parser().parse_args(["eval", "--url", "u", "--out", "o", *argv])


def test_suites_and_names_become_names_of_tasks():
    tasks = parse("--tasks", "needle,passkey,needle_single").tasks
    assert tasks == (*(name for name, task in TASKS.items() if task.suite == "needle"), "passkey")
    assert {TASKS[name].suite for name in parse("--tasks", ",".join(SUITES)).tasks} == set(SUITES)


def test_defaults_are_parsed_as_options_are():
    args = parse()
    assert (args.lengths, args.seeds, args.samples) == ((4096, 8192, 16384), (0,), 11)
    assert all(TASKS[name].suite == "ruler" for name in args.tasks)
    assert args.extra_body == {} and args.api == "completions"


@pytest.mark.parametrize(
    ("argv", "expected", "got"),
    [
        (("--tasks", "needle,nothing"), "infinitebench", "'nothing'"),
        (("--tasks", ""), "names of ruler", "''"),
        (("--lengths", "4096,"), "integers from 1 on", "'4096,'"),
        (("--lengths", "0"), "integers from 1 on", "'0'"),
        (("--seeds", "-1"), "integers from 0 on", "'-1'"),
        (("--samples", "0"), "an integer from 1 on", "'0'"),
        (("--depths", "two"), "an integer from 0 on", "'two'"),
        (("--extra-body", "[1]"), "a JSON object", "'[1]'"),
        (("--extra-body", "{"), "a JSON object", "'{'"),
    ],
)
def test_bad_values_are_refused_with_what_was_expected(argv, expected, got, capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse(*argv)
    error = capsys.readouterr().err
    assert exit_info.value.code == 2
    assert expected in error and f"got {got}" in error


@pytest.mark.parametrize("argv", [("--compare", "v", "w"), ("--show",)])
def test_one_server_or_two_or_none(argv):
    with pytest.raises(SystemExit):
        parse(*argv)


def test_names_belong_to_servers():
    def names(*argv):
        return named_urls(cli.build_parser().parse_args(["eval", "--out", "o", *argv]))

    assert names("--url", "u") == {"server": "u"}
    assert names("--compare", "u", "v") == {"first": "u", "second": "v"}
    assert names("--compare", "u", "v", "--names", "x", "y") == {"x": "u", "y": "v"}
    for bad in (("--url", "u", "--names", "x", "y"), ("--compare", "u", "v", "--names", "x", "x")):
        with pytest.raises(SystemExit, match="--names: expected"):
            names(*bad)
