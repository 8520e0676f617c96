# SPDX-License-Identifier: Apache-2.0
"""The configuration refuses what it cannot mean, and survives its way to other processes."""

from __future__ import annotations

import argparse
import pickle
import re
from dataclasses import fields
from types import SimpleNamespace

import pytest

from sglang_tokenselect import flags
from sglang_tokenselect.config import ConfigError, TokenSelectConfig

BAD = [
    ({"budget": -1}, "budget: expected at least 0, got -1"),
    ({"budget": 1.5}, "budget: expected an integer, got 1.5"),
    ({"budget": True}, "budget: expected an integer, got True"),
    ({"budget": "many"}, "budget: expected an integer, got 'many'"),
    ({"local": 0}, "local: expected at least 1, got 0"),
    ({"theta": float("nan")}, "theta: expected a finite number, got nan"),
    ({"vote_scale": 0.0}, "vote_scale: expected above 0, got 0.0"),
    ({"max_reuse": 0}, "max_reuse: expected at least 1, got 0"),
    ({"positions": "relative"}, "positions: expected one of absolute, compact, got 'relative'"),
    ({"combine": "mean"}, "combine: expected one of max, sum, got 'mean'"),
    ({"block": 100}, "sub_block: expected a divisor of block=100, got 16"),
    ({"dense_layers": (-1,)}, "dense_layers: expected layer numbers from 0 on"),
    ({"positions": "compact", "dense_layers": (0,)}, "dense_layers: expected none with positions=compact"),
    ({"budgte": 3}, "option: expected one of budget, sink"),
    ({"max_budget": 100}, "max_budget: expected at least budget=2048, got 100"),
    ({"min_budget": 4096}, "min_budget: expected at most budget=2048, got 4096"),
    ({"policy": "fast"}, "policy: expected one of fixed, load, slo, got 'fast'"),
    ({"policy": "slo"}, "itl_target_ms: expected a number with policy=slo, got None"),
    ({"itl_target_ms": 0}, "itl_target_ms: expected above 0, got 0"),
    ({"itl_target_ms": "9"}, "itl_target_ms: expected a finite number, got '9'"),
    ({"level": 5}, "level: expected at most 4, got 5"),
    ({"min_mass": 1.5}, "min_mass: expected at most 1.0, got 1.5"),
    ({"max_reuse": 2**31}, "max_reuse: expected at most 2147483647, got 2147483648"),
    ({"min_mass": 0.5, "mass_every": 0}, "mass_every: expected at least 1 with min_mass, got 0"),
    ({"min_group": 1}, "min_group: expected 0 or at least 2, got 1"),
    ({"allow_remote": 1}, "allow_remote: expected true or false, got 1"),
    ({"publish": 5}, "publish: expected a string, got 5"),
    ({"publish": "127.0.0.1:5"}, "publish: expected tcp://HOST:PORT or ipc:///PATH, got '127.0.0.1:5'"),
    ({"control": "tcp://127.0.0.1"}, "control: expected tcp://HOST:PORT"),
    ({"control": "tcp://127.0.0.1:65536"}, "control: expected tcp://HOST:PORT"),
    ({"budget": 10**400}, "budget: expected an integer"),
    ({"theta": 10**400}, "theta: expected a finite number"),
    (
        {"control": "tcp://0.0.0.0:5"},
        "control: expected a host of 127.0.0.1, .*, or allow_remote, got 'tcp://0.0.0.0:5'",
    ),
    ({"publish": "tcp://*:5"}, "publish: expected a host of 127.0.0.1"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=lambda x: str(x)[:40])
def test_impossible_values_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        TokenSelectConfig.from_options(options)


def test_options_that_are_no_mapping_are_named():
    with pytest.raises(ConfigError, match="options: expected a dict or TokenSelectConfig, got 4096"):
        TokenSelectConfig.from_options(4096)


@pytest.mark.parametrize("endpoint", ["tcp://127.0.0.1:5", "tcp://localhost:5", "tcp://[::1]:5", "ipc:///tmp/x"])
def test_endpoints_of_this_machine_pass(endpoint):
    assert TokenSelectConfig(publish=endpoint, control=endpoint).publish == endpoint
    assert TokenSelectConfig(publish="tcp://*:5", allow_remote=True).publish == "tcp://*:5"


def test_defaults_are_those_of_the_spec():
    config = TokenSelectConfig()
    assert (config.sink, config.budget, config.local, config.window.size) == (128, 2048, 512, 2688)
    assert (config.theta, config.max_reuse, config.positions, config.vote_scale) == (0.9, 64, "absolute", 1.0)


def parse(*argv):
    parser = argparse.ArgumentParser()
    flags.add_flags(parser)
    return flags.given_options(parser.parse_args(argv))


def test_every_option_is_a_flag_with_its_default_in_the_help():
    parser = argparse.ArgumentParser()
    flags.add_flags(parser)
    shown = parser.format_help()
    for option in fields(TokenSelectConfig):
        assert re.search(rf"--tokenselect-{option.name.replace('_', '-')}\s", shown)
    assert "(default: 2048)" in shown


def test_flags_not_given_leave_no_trace():
    assert parse() == {}
    assert parse("--tokenselect-budget", "7") == {"budget": 7}


def test_flags_of_each_kind():
    given = parse(
        *("--tokenselect-sub-block", "8", "--tokenselect-theta", "0.5"),
        *("--tokenselect-positions", "compact", "--tokenselect-dense-layers", "0,1,30-31"),
    )
    assert given == {"sub_block": 8, "theta": 0.5, "positions": "compact", "dense_layers": (0, 1, 30, 31)}
    given = parse("--tokenselect-allow-remote", "--tokenselect-min-mass", "1", "--tokenselect-publish", "tcp://*:5")
    assert given == {"allow_remote": True, "min_mass": 1.0, "publish": "tcp://*:5"}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--tokenselect-budget", "many"], "expected a value of type int, got 'many'"),
        (["--tokenselect-budget", "-1"], "expected at least 0, got -1"),
        (["--tokenselect-dense-layers", "a-b"], "expected a list such as 0,1,30-31, got 'a-b'"),
        (["--tokenselect-positions", "sideways"], "expected one of absolute, compact"),
    ],
)
def test_bad_flags_end_with_the_reason(argv, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(*argv)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_the_configuration_rides_on_server_args_through_pickle():
    config = TokenSelectConfig(budget=5, dense_layers=(1, 2))
    server_args = SimpleNamespace()
    flags.attach(server_args, config)
    assert flags.attached(pickle.loads(pickle.dumps(server_args))) == config
    assert flags.attached(SimpleNamespace()) == TokenSelectConfig()
